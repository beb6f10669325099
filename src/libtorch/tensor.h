// Facts about tensors that tch does not give.
#pragma once
namespace at {
class Tensor;
}
namespace tchd {
bool overlaps_itself(const at::Tensor& tensor);
/// Whether two handles are of one tensor.
bool same(const at::Tensor& left, const at::Tensor& right) noexcept;
} // namespace tchd
