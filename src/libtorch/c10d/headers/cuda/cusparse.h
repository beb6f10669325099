// Stands in for cusparse.h where CUDA comes without it; libtorch's headers name what is declared and we never use it.
#pragma once
extern "C" {
typedef struct cusparseContext* cusparseHandle_t;
typedef int cusparseStatus_t;
}
