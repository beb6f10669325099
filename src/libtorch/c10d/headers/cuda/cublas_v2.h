// Stands in for cublas_v2.h where CUDA comes without it; libtorch's headers name what is declared and we never use it.
#pragma once
extern "C" {
typedef struct cublasContext* cublasHandle_t;
typedef int cublasStatus_t;
}
