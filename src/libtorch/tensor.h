// Facts about tensors that tch does not give.
#pragma once
namespace at {
class Tensor;
}
namespace tchd {
bool overlaps_itself(const at::Tensor& tensor);
}
