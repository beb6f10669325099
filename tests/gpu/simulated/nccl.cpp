// NCCL over the host's shared memory: `libnccl.so` for the simulated devices, and for ranks on one machine. Like NCCL, an
// operation is something that a stream does, that waits there for the other ranks, and that hangs when they do something
// else, until the communicator is aborted.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {
constexpr int MOST_RANKS = 16;
constexpr std::size_t PART = 256 << 10;   // of a collective, per rank
constexpr std::size_t LETTER = 32 << 10;  // of a message

// Everything starts as zeros, which is how new shared memory comes.
struct Meeting {
  std::atomic<std::uint32_t> here;
  std::atomic<std::uint32_t> round;
};
struct Box {
  std::atomic<std::uint32_t> full;
  char bytes[LETTER];
};
struct Shared {
  std::atomic<std::uint32_t> attached;
  Meeting streams; // of what streams do
  Meeting hosts;   // of what callers do
  std::uint64_t tags[MOST_RANKS];
  int colors[MOST_RANKS];
  int keys[MOST_RANKS];
  alignas(64) char parts[MOST_RANKS][PART];
  Box boxes[MOST_RANKS][MOST_RANKS];
};

std::size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    default: return 1;
  }
}
void rest() {
  usleep(20);
}
} // namespace

struct ncclComm {
  std::string name;
  int rank = 0;
  int size = 1;
  int device = 0;
  Shared* shared = nullptr;
  std::atomic<bool> aborted{false};
  std::atomic<int> under_way{0};
  int children = 0;
  struct Scalar {
    ncclDataType_t type;
    char host[8];
    const void* device; // read when the operation is done, if there is one
  };
  std::mutex mutex;
  std::map<int, Scalar> factors;
  int next_op = ncclNumOps;

  // Whether all came; not if the communicator was aborted.
  bool meet(Meeting& meeting) {
    const std::uint32_t round = meeting.round.load();
    if (meeting.here.fetch_add(1) + 1 == static_cast<std::uint32_t>(size)) {
      meeting.here.store(0);
      meeting.round.fetch_add(1);
      return true;
    }
    while (meeting.round.load() == round) {
      if (aborted.load()) {
        return false;
      }
      rest();
    }
    return true;
  }
  // The same, and all mean to do the same: else all wait to be aborted.
  bool agree(std::uint64_t tag) {
    shared->tags[rank] = tag;
    if (!meet(shared->streams)) {
      return false;
    }
    for (int other = 0; other < size; ++other) {
      while (shared->tags[other] != tag) {
        if (aborted.load()) {
          return false;
        }
        rest();
      }
    }
    return meet(shared->streams);
  }
};

namespace {
using Comm = ncclComm;

struct Reduction {
  int op = ncclSum;
  bool scaled = false;
  ncclComm::Scalar factor{};
};

template <typename T>
T factor_of(const Reduction& how) {
  T factor;
  std::memcpy(&factor, how.factor.device != nullptr ? how.factor.device : how.factor.host, sizeof factor);
  return factor;
}

template <typename T>
void scale(void* data, std::size_t count, const Reduction& how) {
  if (how.scaled) {
    const T factor = factor_of<T>(how);
    T* all = static_cast<T*>(data);
    for (std::size_t i = 0; i < count; ++i) {
      all[i] = static_cast<T>(all[i] * factor);
    }
  }
}

template <typename T>
void combine(const Comm& comm, std::size_t count, const Reduction& how, void* to) {
  // Sums of halves are not rounded on the way, which NCCL's are.
  using Wide = std::conditional_t<std::is_integral_v<T>, T, double>;
  for (std::size_t i = 0; i < count; ++i) {
    auto at = [&](int rank) { return static_cast<Wide>(reinterpret_cast<const T*>(comm.shared->parts[rank])[i]); };
    Wide all = at(0);
    for (int rank = 1; rank < comm.size; ++rank) {
      const Wide next = at(rank);
      switch (how.op) {
        case ncclProd: all = static_cast<Wide>(all * next); break;
        case ncclMax: all = std::max(all, next); break;
        case ncclMin: all = std::min(all, next); break;
        default: all = static_cast<Wide>(all + next);
      }
    }
    if (how.op == ncclAvg) {
      all = static_cast<Wide>(all / static_cast<Wide>(comm.size));
    }
    static_cast<T*>(to)[i] = static_cast<T>(all);
  }
}

template <typename F>
void with_type(ncclDataType_t type, F&& f) {
  switch (type) {
    case ncclInt8: return f(std::int8_t{});
    case ncclUint8: return f(std::uint8_t{});
    case ncclInt32: return f(std::int32_t{});
    case ncclUint32: return f(std::uint32_t{});
    case ncclInt64: return f(std::int64_t{});
    case ncclUint64: return f(std::uint64_t{});
    case ncclFloat16: return f(c10::Half{});
    case ncclBfloat16: return f(c10::BFloat16{});
    case ncclFloat32: return f(float{});
    case ncclFloat64: return f(double{});
    default: std::fprintf(stderr, "simulated NCCL: no reduction of type %d\n", type);
  }
}

// What is given to a stream: collectives in order, then messages all at once.
struct Message {
  char* data;
  std::size_t bytes;
};
struct Batch {
  Comm* comm;
  cudaStream_t stream;
  std::vector<std::function<bool()>> collectives;
  std::map<int, std::deque<Message>> sends, receives; // by peer
};

void exchange(Comm& comm, Batch& batch) {
  auto left = [](const auto& queues) {
    return std::any_of(queues.begin(), queues.end(), [](const auto& queue) { return !queue.second.empty(); });
  };
  auto step = [](std::deque<Message>& queue, Box& box, std::uint32_t when, auto&& move) {
    while (!queue.empty() && queue.front().bytes == 0) {
      queue.pop_front();
    }
    if (queue.empty() || box.full.load() != when) {
      return false;
    }
    Message& message = queue.front();
    const std::size_t bytes = std::min(message.bytes, LETTER);
    move(message.data, bytes);
    message.data += bytes;
    message.bytes -= bytes;
    box.full.store(1 - when);
    if (message.bytes == 0) {
      queue.pop_front();
    }
    return true;
  };
  while ((left(batch.sends) || left(batch.receives)) && !comm.aborted.load()) {
    bool moved = false;
    for (auto& [peer, queue] : batch.sends) {
      Box& box = comm.shared->boxes[comm.rank][peer];
      moved |= step(queue, box, 0, [&](char* data, std::size_t bytes) { std::memcpy(box.bytes, data, bytes); });
    }
    for (auto& [peer, queue] : batch.receives) {
      Box& box = comm.shared->boxes[peer][comm.rank];
      moved |= step(queue, box, 1, [&](char* data, std::size_t bytes) { std::memcpy(data, box.bytes, bytes); });
    }
    if (!moved) {
      rest();
    }
  }
}

void launch(Batch&& batch) {
  auto* own = new Batch(std::move(batch));
  ++own->comm->under_way;
  cudaLaunchHostFunc(
      own->stream,
      [](void* data) {
        std::unique_ptr<Batch> batch(static_cast<Batch*>(data));
        Comm& comm = *batch->comm;
        bool well = true;
        for (auto& collective : batch->collectives) {
          well = well && collective();
        }
        if (well) {
          exchange(comm, *batch);
        }
        --comm.under_way;
      },
      own);
}

thread_local int depth = 0;
thread_local std::vector<Batch> grouped;

Batch& batch_for(Comm* comm, cudaStream_t stream) {
  for (Batch& batch : grouped) {
    if (batch.comm == comm && batch.stream == stream) {
      return batch;
    }
  }
  return grouped.emplace_back(Batch{comm, stream, {}, {}, {}});
}
ncclResult_t end_of_group() {
  if (depth == 0) {
    for (Batch& batch : std::exchange(grouped, {})) {
      launch(std::move(batch));
    }
  }
  return ncclSuccess;
}
ncclResult_t give(Comm* comm, cudaStream_t stream, std::function<bool()> collective) {
  if (comm == nullptr || comm->aborted.load()) {
    return ncclInvalidUsage;
  }
  batch_for(comm, stream).collectives.push_back(std::move(collective));
  return end_of_group();
}

std::uint64_t tag(const char* what, std::size_t count, ncclDataType_t type, int detail) {
  return std::hash<std::string>{}(
      std::string(what) + ' ' + std::to_string(count) + ' ' + std::to_string(type) + ' ' + std::to_string(detail));
}

Reduction reduction(Comm* comm, ncclRedOp_t op) {
  std::lock_guard lock(comm->mutex);
  auto found = comm->factors.find(op);
  return found == comm->factors.end() ? Reduction{op, false, {}} : Reduction{ncclSum, true, found->second};
}

// Parts of `count` elements: put(first, n) fills this rank's, and take(first, n) uses all.
template <typename Put, typename Take>
bool in_parts(Comm& comm, std::size_t count, std::size_t element, Put put, Take take) {
  const std::size_t most = PART / element;
  for (std::size_t first = 0; first < count; first += most) {
    const std::size_t n = std::min(most, count - first);
    put(first, n);
    if (!comm.meet(comm.shared->streams)) {
      return false;
    }
    take(first, n);
    if (!comm.meet(comm.shared->streams)) {
      return false;
    }
  }
  return true;
}

// A sum of all ranks' `count` elements, taken where `takes`.
bool reduce(Comm& comm, const char* from, char* to, std::size_t count, ncclDataType_t type, const Reduction& how, bool takes) {
  bool well = true;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    char* mine = comm.shared->parts[comm.rank];
    well = in_parts(
        comm, count, sizeof(T),
        [&](std::size_t first, std::size_t n) {
          std::memcpy(mine, from + first * sizeof(T), n * sizeof(T));
          scale<T>(mine, n, how);
        },
        [&](std::size_t first, std::size_t n) {
          if (takes) {
            combine<T>(comm, n, how, to + first * sizeof(T));
          }
        });
  });
  return well;
}

std::string new_name() {
  std::random_device chance;
  char text[64];
  std::snprintf(text, sizeof text, "/simulated-nccl-%08x%08x", chance(), chance());
  return text;
}

ncclResult_t join(ncclComm_t* made, std::string name, int size, int rank) {
  if (size > MOST_RANKS || rank < 0 || rank >= size) {
    return ncclInvalidArgument;
  }
  auto comm = std::make_unique<Comm>();
  comm->name = std::move(name);
  comm->rank = rank;
  comm->size = size;
  cudaGetDevice(&comm->device);
  const int file = shm_open(comm->name.c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) {
    return ncclSystemError;
  }
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) {
    return ncclSystemError;
  }
  comm->shared = static_cast<Shared*>(memory);
  comm->shared->attached.fetch_add(1);
  while (comm->shared->attached.load() < static_cast<std::uint32_t>(size)) {
    rest();
  }
  if (!comm->meet(comm->shared->hosts)) {
    return ncclSystemError;
  }
  if (rank == 0) {
    shm_unlink(comm->name.c_str());
  }
  *made = comm.release();
  return ncclSuccess;
}
} // namespace

extern "C" {
ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : result == ncclInvalidUsage ? "invalid usage" : "error of the simulated NCCL";
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

// Communicators.
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 0, sizeof *id);
  std::strcpy(id->internal, new_name().c_str());
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) { return join(comm, id.internal, size, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return join(comm, id.internal, size, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return join(comm, ids[0].internal, size, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* child, ncclConfig_t*) {
  Shared& shared = *parent->shared;
  shared.colors[parent->rank] = color;
  shared.keys[parent->rank] = key;
  const int number = ++parent->children;
  if (!parent->meet(shared.hosts)) {
    return ncclSystemError;
  }
  std::vector<std::pair<int, int>> members;
  for (int rank = 0; rank < parent->size; ++rank) {
    if (shared.colors[rank] == color) {
      members.emplace_back(shared.keys[rank], rank);
    }
  }
  if (!parent->meet(shared.hosts)) {
    return ncclSystemError;
  }
  *child = nullptr;
  if (color == NCCL_SPLIT_NOCOLOR) {
    return ncclSuccess;
  }
  std::sort(members.begin(), members.end());
  const auto mine = std::find(members.begin(), members.end(), std::pair(key, parent->rank));
  return join(
      child, parent->name + '-' + std::to_string(number) + '-' + std::to_string(color), static_cast<int>(members.size()),
      static_cast<int>(mine - members.begin()));
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (comm == nullptr) {
    return ncclSuccess;
  }
  comm->aborted.store(true);
  while (comm->under_way.load() > 0) {
    rest();
  }
  return ncclSuccess; // kept, for who asks it for its rank
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm == nullptr) {
    return ncclInvalidArgument;
  }
  while (comm->under_way.load() > 0) {
    rest();
  }
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return comm == nullptr ? ncclSuccess : ncclCommFinalize(comm); }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  if (comm == nullptr) {
    return ncclInvalidArgument;
  }
  *error = ncclSuccess;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommRegister(const ncclComm_t, void*, std::size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void** pointer, std::size_t bytes) {
  return cudaMalloc(pointer, bytes) == cudaSuccess ? ncclSuccess : ncclSystemError;
}
ncclResult_t ncclMemFree(void* pointer) { return cudaFree(pointer) == cudaSuccess ? ncclSuccess : ncclSystemError; }

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type, ncclScalarResidence_t where, ncclComm_t comm) {
  std::lock_guard lock(comm->mutex);
  ncclComm::Scalar factor{type, {}, nullptr};
  if (where == ncclScalarHostImmediate) {
    std::memcpy(factor.host, scalar, size_of(type));
  } else {
    factor.device = scalar;
  }
  *op = static_cast<ncclRedOp_t>(comm->next_op++);
  comm->factors[*op] = factor;
  return ncclSuccess;
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t comm) {
  std::lock_guard lock(comm->mutex);
  comm->factors.erase(op);
  return ncclSuccess;
}

// Groups of operations.
ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (depth == 0) {
    return ncclInvalidUsage;
  }
  --depth;
  return end_of_group();
}

// Collectives.
ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return give(comm, stream, [=, how = reduction(comm, op)] {
    return comm->agree(tag("all_reduce", count, type, how.op)) &&
        reduce(*comm, static_cast<const char*>(from), static_cast<char*>(to), count, type, how, true);
  });
}
ncclResult_t ncclReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  return give(comm, stream, [=, how = reduction(comm, op)] {
    return comm->agree(tag("reduce", count, type, how.op * 100 + root)) &&
        reduce(*comm, static_cast<const char*>(from), static_cast<char*>(to), count, type, how, comm->rank == root);
  });
}
ncclResult_t ncclReduceScatter(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return give(comm, stream, [=, how = reduction(comm, op)] {
    bool well = comm->agree(tag("reduce_scatter", count, type, how.op));
    // In place, a result is written where this rank's own part of the input was, and read before.
    for (int rank = 0; rank < comm->size && well; ++rank) {
      const char* part = static_cast<const char*>(from) + static_cast<std::size_t>(rank) * count * size_of(type);
      well = reduce(*comm, part, static_cast<char*>(to), count, type, how, comm->rank == rank);
    }
    return well;
  });
}
// Of these two NCCL sees bytes: ranks may call them by different types.
ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = count * size_of(type);
  return give(comm, stream, [=] {
    return comm->agree(tag("broadcast", bytes, ncclInt8, root)) &&
        in_parts(
               *comm, bytes, 1,
               [&](std::size_t first, std::size_t n) {
                 if (comm->rank == root) {
                   std::memcpy(comm->shared->parts[root], static_cast<const char*>(from) + first, n);
                 }
               },
               [&](std::size_t first, std::size_t n) {
                 std::memcpy(static_cast<char*>(to) + first, comm->shared->parts[root], n);
               });
  });
}
ncclResult_t ncclBcast(void* data, std::size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = count * size_of(type);
  return give(comm, stream, [=] {
    return comm->agree(tag("all_gather", bytes, ncclInt8, 0)) &&
        in_parts(
               *comm, bytes, 1,
               [&](std::size_t first, std::size_t n) {
                 std::memcpy(comm->shared->parts[comm->rank], static_cast<const char*>(from) + first, n);
               },
               [&](std::size_t first, std::size_t n) {
                 for (int rank = 0; rank < comm->size; ++rank) {
                   std::memcpy(static_cast<char*>(to) + static_cast<std::size_t>(rank) * bytes + first, comm->shared->parts[rank], n);
                 }
               });
  });
}
ncclResult_t ncclSend(const void* data, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  if (comm == nullptr || comm->aborted.load() || peer < 0 || peer >= comm->size) {
    return ncclInvalidUsage;
  }
  char* bytes = const_cast<char*>(static_cast<const char*>(data));
  batch_for(comm, stream).sends[peer].push_back({bytes, count * size_of(type)});
  return end_of_group();
}
ncclResult_t ncclRecv(void* data, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  if (comm == nullptr || comm->aborted.load() || peer < 0 || peer >= comm->size) {
    return ncclInvalidUsage;
  }
  batch_for(comm, stream).receives[peer].push_back({static_cast<char*>(data), count * size_of(type)});
  return end_of_group();
}
ncclResult_t ncclAlltoAll(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = count * size_of(type);
  ncclGroupStart();
  for (int peer = 0; peer < comm->size; ++peer) {
    ncclSend(static_cast<const char*>(from) + static_cast<std::size_t>(peer) * bytes, count, type, peer, comm, stream);
    ncclRecv(static_cast<char*>(to) + static_cast<std::size_t>(peer) * bytes, count, type, peer, comm, stream);
  }
  return ncclGroupEnd();
}

} // extern "C"
