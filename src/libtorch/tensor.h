// Facts about tensors that tch does not give.
#pragma once
#include <cstdint>
namespace at {
class Tensor;
}
namespace tchd {
enum class MemOverlap : std::uint8_t;
MemOverlap overlap_at_a_glance(const at::Tensor& tensor);
/// Whether two handles are of one tensor.
bool same(const at::Tensor& left, const at::Tensor& right) noexcept;
} // namespace tchd
