// Stands in for cublasLt.h where CUDA comes without it; libtorch's headers name what is declared and we never use it.
#pragma once
extern "C" {
typedef struct cublasLtContext* cublasLtHandle_t;
}
