#include "tch-distributed/src/libtorch/function.rs.h"

#include <torch/csrc/autograd/custom_function.h>

namespace tchd {
namespace {
namespace ag = torch::autograd;

// The Rust side of one application. It lives in the graph node and dies with it.
struct Application : torch::CustomClassHolder {
  explicit Application(rust::Box<RustFunction> function) : function(std::move(function)) {}
  rust::Box<RustFunction> function;
};

constexpr auto kApplication = "tchd";

struct Node : ag::Function<Node> {
  // The inputs must be a TensorList: autograd does not see the tensors of a std::vector.
  static ag::variable_list forward(
      ag::AutogradContext* ctx,
      const c10::intrusive_ptr<Application>& application,
      at::TensorList inputs) {
    ctx->saved_data[kApplication] =
        c10::IValue::make_capsule(c10::intrusive_ptr<torch::CustomClassHolder>(application));
    Tensors outputs, saved;
    ctx->set_materialize_grads(
        run_forward(*application->function, Tensors(inputs.vec()), outputs, saved));
    ctx->save_for_backward(std::move(saved.list()));
    return std::move(outputs.list());
  }

  static ag::variable_list backward(ag::AutogradContext* ctx, ag::variable_list grads) {
    auto capsule = ctx->saved_data.at(kApplication).toCapsule();
    const auto& application = static_cast<const Application&>(*capsule);
    Tensors results;
    run_backward(
        *application.function,
        Tensors(std::move(grads)),
        Tensors(ctx->get_saved_variables()),
        results);
    // One more for the application itself, which has no gradient.
    auto& list = results.list();
    list.insert(list.begin(), at::Tensor());
    return std::move(list);
  }
};
} // namespace

bool grad_enabled() noexcept {
  return c10::GradMode::is_enabled();
}

std::unique_ptr<Tensors> apply_function(rust::Box<RustFunction> function, const Tensors& inputs) {
  auto application = c10::make_intrusive<Application>(std::move(function));
  return std::make_unique<Tensors>(Node::apply(application, at::TensorList(inputs.list())));
}
} // namespace tchd
