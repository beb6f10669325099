// Stands in for cusolver_common.h where CUDA comes without it; libtorch's headers name what is declared and we never use it.
#pragma once
extern "C" {
typedef int cusolverStatus_t;
}
