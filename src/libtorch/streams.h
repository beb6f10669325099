// CUDA streams and events, for what belongs to an operation of a device besides the operation itself.
#pragma once
#include <cstdint>
#include <memory>

namespace tchd {
struct SideStreamParts;
struct MarkParts;

/// A point in a stream's work.
class Mark {
 public:
  explicit Mark(std::unique_ptr<MarkParts> parts);
  ~Mark();
  /// Whether the device has come to it. Never blocks.
  bool passed() const;
  /// What this thread's current stream does from now on comes after it.
  void order() const;

 private:
  std::unique_ptr<MarkParts> parts_;
};

/// A stream beside the one that the program computes on.
class SideStream {
 public:
  explicit SideStream(std::unique_ptr<SideStreamParts> parts);
  ~SideStream();
  /// Makes it this thread's current stream; its work comes after what the one before has been given.
  void enter() const;
  /// Makes the stream before `enter` the current one again; the mark is where this stream is now.
  std::unique_ptr<Mark> leave() const;

 private:
  std::unique_ptr<SideStreamParts> parts_;
};

std::unique_ptr<SideStream> new_side_stream(std::int32_t device, bool high_priority);
/// Makes it this thread's current device: nothing is then allocated on another unasked.
void use_device(std::int32_t device);
} // namespace tchd
