// In place of nccl.cpp where the feature `nccl` is off.
#include "../c10d.h"

#include <stdexcept>

namespace tchd {
rust::String why_no_nccl() {
  return "this program was built without the feature nccl of tch-distributed";
}
std::unique_ptr<C10dBackend> new_nccl(
    const StoreHandle&,
    std::int32_t,
    rust::Slice<const std::uint64_t>,
    rust::Str,
    const NcclPlan&) {
  throw std::runtime_error("this build has no NCCL");
}
std::unique_ptr<C10dBackend> split_nccl(
    const C10dBackend&,
    const StoreHandle&,
    rust::Slice<const std::int32_t>,
    rust::Slice<const std::uint64_t>,
    rust::Str,
    const NcclPlan&) {
  throw std::runtime_error("this build has no NCCL");
}
} // namespace tchd
