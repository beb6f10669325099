// What a collective needs to know of a tensor, in one call.
#pragma once
namespace at {
class Tensor;
}
namespace tchd {
struct RawFacts;
RawFacts facts(const at::Tensor& tensor) noexcept;
} // namespace tchd
