// Through c10's view of any device, which needs neither CUDA's headers nor its libraries: in a libtorch without CUDA
// every one of these throws.
#include "tch-distributed/src/libtorch/streams.rs.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <optional>

namespace tchd {
namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;

c10::impl::VirtualGuardImpl cuda() {
  return c10::impl::VirtualGuardImpl(CUDA);
}
c10::Device device_of(std::int32_t index) {
  return c10::Device(CUDA, static_cast<c10::DeviceIndex>(index));
}
} // namespace

struct MarkParts {
  c10::Event event{CUDA};
};
struct SideStreamParts {
  explicit SideStreamParts(c10::Stream own) : stream(own) {}
  c10::Stream stream;
  // While it is the current stream of the thread that entered it. One thread at a time does.
  std::optional<c10::StreamGuard> entered;
};

Mark::Mark(std::unique_ptr<MarkParts> parts) : parts_(std::move(parts)) {}
Mark::~Mark() = default;
bool Mark::passed() const {
  return parts_->event.query();
}
void Mark::order() const {
  parts_->event.block(cuda().getStream(parts_->event.device()));
}

SideStream::SideStream(std::unique_ptr<SideStreamParts> parts) : parts_(std::move(parts)) {}
SideStream::~SideStream() = default;
void SideStream::enter() const {
  c10::Event before(CUDA);
  before.record(cuda().getStream(parts_->stream.device()));
  before.block(parts_->stream);
  parts_->entered.emplace(parts_->stream);
}
std::unique_ptr<Mark> SideStream::leave() const {
  parts_->entered.reset();
  auto mark = std::make_unique<MarkParts>();
  mark->event.record(parts_->stream);
  return std::make_unique<Mark>(std::move(mark));
}

std::unique_ptr<SideStream> new_side_stream(std::int32_t device, bool high_priority) {
  auto stream = cuda().getStreamFromGlobalPool(device_of(device), high_priority);
  return std::make_unique<SideStream>(std::make_unique<SideStreamParts>(stream));
}
void use_device(std::int32_t device) {
  cuda().setDevice(device_of(device));
}
} // namespace tchd
