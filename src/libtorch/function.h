// Operations of ours that autograd records and differentiates.
#pragma once
#include <memory>
#include "list.h"
#include "rust/cxx.h"

namespace tchd {
struct RustFunction;

bool grad_enabled() noexcept;
std::unique_ptr<Tensors> apply_function(rust::Box<RustFunction> function, const Tensors& inputs);
} // namespace tchd
