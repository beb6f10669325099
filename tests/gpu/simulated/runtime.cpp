// A CUDA runtime whose devices are the host's memory and threads: `libcudart.so` for a machine without a GPU. Streams are
// threads that do what they were given in order, so that what a program forgot to order goes wrong here as it would on a
// GPU; events are points in them. There are no kernels: `operators.cpp` does on a stream what libtorch's kernels would.
//
// SIMULATED_CUDA_DEVICES  how many devices there are (1)
// SIMULATED_CUDA_BOUND    if set, memory of another device than that of LOCAL_RANK cannot be had
// SIMULATED_CUDA_DELAY    the most microseconds that a stream waits before it does something, by chance (0)
#include <cuda_runtime_api.h>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {
using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;
constexpr std::size_t MEMORY = std::size_t{16} << 30;
constexpr int MOST_DEVICES = 16;

int number_of(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}
int device_count() {
  static const int count = std::min(number_of("SIMULATED_CUDA_DEVICES", 1), MOST_DEVICES);
  return count;
}
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

// A point in a stream, reached or not.
class Mark {
 public:
  void reach() {
    {
      Lock lock(mutex_);
      at_ = Clock::now();
      reached_ = true;
    }
    come_.notify_all();
  }
  void wait() {
    Lock lock(mutex_);
    come_.wait(lock, [this] { return reached_; });
  }
  bool reached() {
    Lock lock(mutex_);
    return reached_;
  }
  Clock::time_point at() const { return at_; }

 private:
  std::mutex mutex_;
  std::condition_variable come_;
  bool reached_ = false;
  Clock::time_point at_;
};

void dawdle() {
  static const int most = number_of("SIMULATED_CUDA_DELAY", 0);
  if (most > 0) {
    thread_local std::minstd_rand chance(std::random_device{}());
    usleep(chance() % most);
  }
}

class Stream {
 public:
  Stream(int device, int priority) : device(device), priority(priority) {}
  const int device;
  const int priority;

  void give(std::function<void()> task) {
    Lock lock(mutex_);
    if (!has_thread_) {
      has_thread_ = true;
      std::thread([this] { serve(); }).detach();
    }
    tasks_.push_back(std::move(task));
    come_.notify_all();
  }
  bool idle() {
    Lock lock(mutex_);
    return tasks_.empty();
  }
  void drain() {
    if (!idle()) {
      auto mark = std::make_shared<Mark>();
      give([mark] { mark->reach(); });
      mark->wait();
    }
  }

 private:
  [[noreturn]] void serve() {
    current_device = device;
    for (;;) {
      Lock lock(mutex_);
      come_.wait(lock, [this] { return !tasks_.empty(); });
      std::function<void()> task = tasks_.front();
      lock.unlock();
      dawdle();
      task();
      task = nullptr;
      lock.lock();
      tasks_.pop_front();
    }
  }
  std::mutex mutex_;
  std::condition_variable come_;
  std::deque<std::function<void()>> tasks_; // what is done now is the first
  bool has_thread_ = false;
};

// All of this outlives the process's statics: streams run on while it ends.
struct Machine {
  std::mutex mutex;
  std::unordered_set<Stream*> streams;
  Stream* defaults[MOST_DEVICES] = {};
  struct Memory {
    std::size_t bytes;
    int device;
    cudaMemoryType type;
  };
  std::map<char*, Memory> memory;
  std::size_t used[MOST_DEVICES] = {};
  std::map<const void*, std::string> kernels;
};
Machine& machine() {
  static auto* const one = new Machine;
  return *one;
}

Stream& stream_of(cudaStream_t handle) {
  if (handle != nullptr && handle != cudaStreamLegacy && handle != cudaStreamPerThread) {
    return *reinterpret_cast<Stream*>(handle);
  }
  Lock lock(machine().mutex);
  Stream*& stream = machine().defaults[current_device];
  if (stream == nullptr) {
    stream = new Stream(current_device, 0);
    machine().streams.insert(stream);
  }
  return *stream;
}
cudaError_t new_stream(cudaStream_t* handle, int priority) {
  auto* stream = new Stream(current_device, priority);
  Lock lock(machine().mutex);
  machine().streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
void drain_all() {
  std::vector<Stream*> all;
  {
    Lock lock(machine().mutex);
    all.assign(machine().streams.begin(), machine().streams.end());
  }
  for (Stream* stream : all) {
    stream->drain();
  }
}

struct Event {
  std::mutex mutex;
  std::shared_ptr<Mark> mark;
};
Event& event_of(cudaEvent_t handle) {
  return *reinterpret_cast<Event*>(handle);
}
std::shared_ptr<Mark> mark_of(cudaEvent_t handle) {
  Lock lock(event_of(handle).mutex);
  return event_of(handle).mark;
}

const Machine::Memory* memory_at(const void* pointer) {
  auto& all = machine().memory;
  auto after = all.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (after == all.begin()) {
    return nullptr;
  }
  --after;
  return static_cast<const char*>(pointer) < after->first + after->second.bytes ? &after->second : nullptr;
}
cudaMemoryType type_at(const void* pointer) {
  Lock lock(machine().mutex);
  const auto* memory = memory_at(pointer);
  return memory != nullptr ? memory->type : cudaMemoryTypeUnregistered;
}

cudaError_t allocate(void** pointer, std::size_t bytes, cudaMemoryType type) {
  auto& m = machine();
  if (type == cudaMemoryTypeDevice) {
    static const int bound = std::getenv("SIMULATED_CUDA_BOUND") != nullptr ? number_of("LOCAL_RANK", -1) : -1;
    if (bound >= 0 && current_device != bound) {
      std::fprintf(stderr, "simulated CUDA: %zu bytes of device %d, by the rank of device %d\n", bytes, current_device, bound);
      return result(cudaErrorMemoryAllocation);
    }
    Lock lock(m.mutex);
    if (m.used[current_device] + bytes > MEMORY) {
      return result(cudaErrorMemoryAllocation);
    }
    m.used[current_device] += bytes;
  }
  const std::size_t room = (std::max<std::size_t>(bytes, 1) + 511) / 512 * 512;
  *pointer = std::aligned_alloc(512, room);
  if (*pointer == nullptr) {
    return result(cudaErrorMemoryAllocation);
  }
  std::memset(*pointer, 0xFF, room); // not a number: what reads it before it is written is seen
  Lock lock(m.mutex);
  m.memory[static_cast<char*>(*pointer)] = {room, current_device, type};
  return cudaSuccess;
}
cudaError_t release(void* pointer) {
  if (pointer == nullptr) {
    return cudaSuccess;
  }
  drain_all();
  auto& m = machine();
  Lock lock(m.mutex);
  auto found = m.memory.find(static_cast<char*>(pointer));
  if (found == m.memory.end()) {
    return result(cudaErrorInvalidValue);
  }
  if (found->second.type == cudaMemoryTypeDevice) {
    m.used[found->second.device] -= std::min(m.used[found->second.device], found->second.bytes);
  }
  m.memory.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, std::size_t bytes, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  if (bytes == 0) {
    return cudaSuccess;
  }
  const bool pageable_source = type_at(from) == cudaMemoryTypeUnregistered;
  const bool pageable_target = type_at(to) == cudaMemoryTypeUnregistered;
  if (pageable_source) { // it may change as soon as this returns
    auto kept = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    stream.give([=] { std::memcpy(to, kept->data(), bytes); });
  } else {
    stream.give([=] { std::memcpy(to, from, bytes); });
  }
  if (pageable_target) {
    stream.drain();
  }
  return cudaSuccess;
}

cudaError_t no_kernel(const void* function) {
  Lock lock(machine().mutex);
  auto found = machine().kernels.find(function);
  std::fprintf(stderr, "simulated CUDA: no kernel can be run: %s\n", found != machine().kernels.end() ? found->second.c_str() : "of no name");
  return result(cudaErrorNotSupported);
}
} // namespace

extern "C" {
// Devices.
cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) {
    return result(cudaErrorInvalidDevice);
  }
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  drain_all();
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int device) {
  if (device < 0 || device >= device_count()) {
    return result(cudaErrorInvalidDevice);
  }
  *of = cudaDeviceProp{};
  std::snprintf(of->name, sizeof of->name, "simulated on the host");
  of->totalGlobalMem = MEMORY;
  of->major = 9;
  of->multiProcessorCount = 2;
  of->maxThreadsPerMultiProcessor = 2048;
  of->maxThreadsPerBlock = 1024;
  of->warpSize = 32;
  of->regsPerBlock = of->regsPerMultiprocessor = 65536;
  of->sharedMemPerBlock = of->sharedMemPerMultiprocessor = of->sharedMemPerBlockOptin = 48 << 10;
  of->l2CacheSize = 1 << 20;
  for (int i = 0; i < 3; ++i) {
    of->maxThreadsDim[i] = 1024;
    of->maxGridSize[i] = 65535;
  }
  of->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  std::snprintf(text, static_cast<std::size_t>(bytes), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  Lock lock(machine().mutex);
  *total = MEMORY;
  *free = MEMORY - machine().used[current_device];
  return cudaSuccess;
}

// Errors.
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorNotReady ? "cudaErrorNotReady" : "simulated error";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported by the simulated device";
    default: return "error of the simulated device";
  }
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

// Streams.
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_stream(stream, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) { return new_stream(stream, priority); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream_of(stream).drain(); // and kept: its thread may still be in it
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return stream_of(stream).idle() ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream_of(stream).drain();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (auto mark = mark_of(event)) {
    stream_of(stream).give([mark] { mark->wait(); });
  }
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  stream_of(stream).give([=] { function(data); });
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  stream_of(stream).give([=] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, std::size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id != nullptr) {
    *id = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// Events.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto mark = std::make_shared<Mark>();
  {
    Lock lock(event_of(event).mutex);
    event_of(event).mark = mark;
  }
  stream_of(stream).give([mark] { mark->reach(); });
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto mark = mark_of(event);
  return mark == nullptr || mark->reached() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (auto mark = mark_of(event)) {
    mark->wait();
  }
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto from = mark_of(start), to = mark_of(end);
  if (from == nullptr || to == nullptr) {
    return result(cudaErrorInvalidResourceHandle);
  }
  if (!from->reached() || !to->reached()) {
    return cudaErrorNotReady;
  }
  *milliseconds = std::chrono::duration<float, std::milli>(to->at() - from->at()).count();
  return cudaSuccess;
}

// Memory.
cudaError_t cudaMalloc(void** pointer, std::size_t bytes) { return allocate(pointer, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) { return allocate(pointer, bytes, cudaMemoryTypeHost); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaHostRegister(void* pointer, std::size_t bytes, unsigned) {
  Lock lock(machine().mutex);
  machine().memory[static_cast<char*>(pointer)] = {bytes, current_device, cudaMemoryTypeHost};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock(machine().mutex);
  machine().memory.erase(static_cast<char*>(pointer));
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* of, const void* pointer) {
  *of = cudaPointerAttributes{};
  Lock lock(machine().mutex);
  const auto* memory = memory_at(pointer);
  of->type = memory != nullptr ? memory->type : cudaMemoryTypeUnregistered;
  of->device = memory != nullptr ? memory->device : -1;
  of->hostPointer = of->type == cudaMemoryTypeHost ? const_cast<void*>(pointer) : nullptr;
  of->devicePointer = memory != nullptr ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  const cudaError_t error = copy(to, from, bytes, nullptr);
  stream_of(nullptr).drain();
  return error;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy2DAsync(
    void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width, std::size_t height,
    cudaMemcpyKind, cudaStream_t stream) {
  for (std::size_t row = 0; row < height; ++row) {
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width, stream);
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t stream) {
  stream_of(stream).give([=] { std::memset(pointer, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* pointer, int value, std::size_t bytes) { return cudaMemsetAsync(pointer, value, bytes, nullptr); }

// Kernels: their names, and that they cannot be run.
void** __cudaRegisterFatBinary(void*) {
  static void* nothing = nullptr;
  return &nothing;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(machine().mutex);
  machine().kernels.emplace(function, name);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, std::size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return no_kernel(reinterpret_cast<const void*>(kernel));
}
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, std::size_t, cudaStream_t) { return no_kernel(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) { return no_kernel(function); }
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return no_kernel(function);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, std::size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  if (status != nullptr) {
    *status = cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

} // extern "C"
