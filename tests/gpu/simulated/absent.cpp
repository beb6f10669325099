// Functions of CUDA's runtime and driver and of NCCL that libtorch is linked with and the programs here do not come to. Who does is
// told. Without their headers, whose declarations have their parameters.
#include <cstdio>

namespace {
int absent(const char* name) {
  std::fprintf(stderr, "simulated CUDA: there is no %s\n", name);
  return 801; // cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED
}
} // namespace

#define ABSENT(name) \
  int name() { return absent(#name); }

extern "C" {
ABSENT(cudaDeviceGetDefaultMemPool)
ABSENT(cudaFreeAsync)
ABSENT(cudaFuncGetAttributes)
ABSENT(cudaGetSymbolAddress)
ABSENT(cudaGraphAddNode)
ABSENT(cudaGraphConditionalHandleCreate)
ABSENT(cudaGraphDebugDotPrint)
ABSENT(cudaGraphDestroy)
ABSENT(cudaGraphExecDestroy)
ABSENT(cudaGraphGetNodes)
ABSENT(cudaGraphInstantiateWithFlags)
ABSENT(cudaGraphLaunch)
ABSENT(cudaGraphNodeGetDependencies)
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaKernelSetAttributeForDevice)
ABSENT(cudaLibraryGetKernel)
ABSENT(cudaLibraryLoadData)
ABSENT(cudaLibraryUnload)
ABSENT(cudaMallocAsync)
ABSENT(cudaMemPoolGetAttribute)
ABSENT(cudaMemPoolSetAccess)
ABSENT(cudaMemPoolSetAttribute)
ABSENT(cudaMemPoolTrimTo)
ABSENT(cudaMemcpyToSymbol)
ABSENT(cudaStreamBeginCapture)
ABSENT(cudaStreamBeginCaptureToGraph)
ABSENT(cudaStreamEndCapture)
ABSENT(cudaStreamUpdateCaptureDependencies)

// The driver's (`libcuda.so.1`), which libtorch asks whether a device is in use already.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
ABSENT(cuCtxGetCurrent)
ABSENT(cuCtxSetCurrent)
ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetAttribute)
ABSENT(cuDevicePrimaryCtxRetain)
ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute)
ABSENT(cuFuncSetCacheConfig)
ABSENT(cuGetErrorString)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel)
ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleLoad)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx)
ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cuPointerGetAttribute)
ABSENT(cuTensorMapEncodeTiled)

// NCCL's.
ABSENT(ncclCommInitAll)
ABSENT(ncclCommMemStats)
ABSENT(ncclCommResume)
ABSENT(ncclCommShrink)
ABSENT(ncclCommSuspend)
ABSENT(ncclCommWindowDeregister)
ABSENT(ncclCommWindowRegister)
ABSENT(ncclDevCommCreate)
ABSENT(ncclDevCommDestroy)
ABSENT(ncclGetLsaMultimemDevicePointer)
ABSENT(ncclGetPeerDevicePointer)
ABSENT(ncclGroupSimulateEnd)
ABSENT(ncclPutSignal)
ABSENT(ncclSignal)
ABSENT(ncclWaitSignal)
} // extern "C"
