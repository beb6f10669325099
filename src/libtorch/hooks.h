// Gradient hooks, callbacks at the end of backward, and the gradient itself.
#pragma once
#include <cstdint>
#include <memory>
#include "list.h"
#include "rust/cxx.h"

namespace tchd {
struct HookList;
struct EndOfBackward;

/// Bits: 1 defined, 2 requires a gradient, 4 leaf.
std::uint8_t grad_state(const at::Tensor& tensor) noexcept;
/// The list behind the tensor's hook, which is made where there is none.
rust::Box<HookList> accumulated_hooks(const at::Tensor& tensor);
rust::Box<HookList> grad_hooks(const at::Tensor& tensor);
bool in_backward() noexcept;
void after_backward(rust::Box<EndOfBackward> callback);
void set_grad(const at::Tensor& tensor, const at::Tensor& grad);
void clear_grad(const at::Tensor& tensor);
void backward(const Tensors& roots, const Tensors& grads, bool retain_graph, bool create_graph);
} // namespace tchd
