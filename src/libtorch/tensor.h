// Facts about tensors that tch does not give.
#pragma once
#include "rust/cxx.h"
#include <cstddef>
#include <cstdint>
namespace at {
class Tensor;
}
namespace tchd {
enum class MemOverlap : std::uint8_t;
struct Keeper;
MemOverlap overlap_at_a_glance(const at::Tensor& tensor);
/// An empty tensor of the CPU, of this shape and kind, in memory that CUDA devices copy from and to by themselves.
at::Tensor* empty_pinned_like(const at::Tensor& like);
/// Where its first element is in its memory, in elements.
std::int64_t storage_offset(const at::Tensor& tensor) noexcept;
/// Whether two handles are of one tensor.
bool same(const at::Tensor& left, const at::Tensor& right) noexcept;
/// A CPU tensor over foreign memory; the keeper is dropped with its storage. Made with `new`.
at::Tensor* tensor_over(
    std::size_t data,
    rust::Slice<const std::int64_t> size,
    std::int8_t kind,
    rust::Box<Keeper> keeper);
/// Whether another tensor, which somebody may still use, lies in the same memory.
bool shares_memory(const at::Tensor& tensor);
} // namespace tchd
