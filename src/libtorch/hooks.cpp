#include "tch-distributed/src/libtorch/hooks.rs.h"

#include <ATen/core/VariableHooksInterface.h>
#include <mutex>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/cpp_hook.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

namespace tchd {
namespace {
namespace ag = torch::autograd;
using GradHookFunction = ag::hooks_list::value_type;

// Two threads may register their first hooks on one tensor at once.
std::mutex& registering() {
  static std::mutex mutex;
  return mutex;
}

// One for each tensor; the list is on the Rust side. libtorch has room for one hook only: another's
// is kept and runs first.
class AccumulatedHook : public ag::PostAccumulateGradHook {
 public:
  AccumulatedHook(rust::Box<HookList> hooks, std::unique_ptr<ag::PostAccumulateGradHook> before)
      : hooks_(std::move(hooks)), before_(std::move(before)) {}
  void operator()(const ag::Variable& tensor) override {
    if (before_) {
      (*before_)(tensor);
    }
    run_accumulated_hooks(*hooks_, tensor);
  }
  rust::Box<HookList> share() const {
    return share_hooks(*hooks_);
  }

 private:
  rust::Box<HookList> hooks_;
  std::unique_ptr<ag::PostAccumulateGradHook> before_;
};

struct GradHook {
  std::shared_ptr<rust::Box<HookList>> hooks;
  at::TensorBase operator()(const at::TensorBase& grad) const {
    if (!grad.defined()) {
      return {};
    }
    std::unique_ptr<at::Tensor> other(run_grad_hooks(**hooks, at::Tensor(grad)));
    return other ? *other : at::TensorBase();
  }
};
} // namespace

std::uint8_t grad_state(const at::Tensor& tensor) noexcept {
  if (!tensor.defined()) {
    return 0;
  }
  return 1 | (tensor.requires_grad() ? 2 : 0) | (tensor.is_leaf() ? 4 : 0);
}

rust::Box<HookList> accumulated_hooks(const at::Tensor& tensor) {
  std::lock_guard<std::mutex> lock(registering());
  auto& slot = ag::impl::post_acc_grad_hooks(tensor);
  if (auto* ours = dynamic_cast<AccumulatedHook*>(slot.get())) {
    return ours->share();
  }
  auto hook = std::make_unique<AccumulatedHook>(new_hooks(), std::move(slot));
  auto hooks = hook->share();
  ag::impl::set_post_acc_grad_hooks(tensor, std::move(hook));
  return hooks;
}

rust::Box<HookList> grad_hooks(const at::Tensor& tensor) {
  std::lock_guard<std::mutex> lock(registering());
  if (auto* meta = ag::impl::get_autograd_meta(tensor); meta && meta->cpp_hooks_list_) {
    for (GradHookFunction& hook : *meta->cpp_hooks_list_) {
      if (auto* ours = hook.target<GradHook>()) {
        return share_hooks(**ours->hooks);
      }
    }
  }
  auto hooks = new_hooks();
  auto shared = std::make_shared<rust::Box<HookList>>(share_hooks(*hooks));
  at::impl::GetVariableHooks()->_register_hook(tensor, GradHookFunction(GradHook{std::move(shared)}));
  return hooks;
}

bool in_backward() noexcept {
  return ag::get_current_graph_task_id() != -1;
}

void after_backward(rust::Box<EndOfBackward> callback) {
  auto shared = std::make_shared<rust::Box<EndOfBackward>>(std::move(callback));
  ag::Engine::get_default_engine().queue_callback([shared] { run_end_of_backward(**shared); });
}

void set_grad(const at::Tensor& tensor, const at::Tensor& grad) {
  tensor.mutable_grad() = grad;
}
void clear_grad(const at::Tensor& tensor) {
  tensor.mutable_grad().reset();
}

void backward(const Tensors& roots, const Tensors& grads, bool retain_graph, bool create_graph) {
  ag::backward(roots.list(), grads.list(), retain_graph, create_graph);
}
} // namespace tchd
