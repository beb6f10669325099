// Stands in for cusolverDn.h where CUDA comes without it; libtorch's headers name what is declared and we never use it.
#pragma once
extern "C" {
typedef struct cusolverDnContext* cusolverDnHandle_t;
}
