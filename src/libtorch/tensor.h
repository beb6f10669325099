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
/// Whether two handles are of one tensor.
bool same(const at::Tensor& left, const at::Tensor& right) noexcept;
/// A CPU tensor over foreign memory; the keeper is dropped with its storage. Made with `new`.
at::Tensor* tensor_over(
    std::size_t data,
    rust::Slice<const std::int64_t> size,
    std::int8_t kind,
    rust::Box<Keeper> keeper);
} // namespace tchd
