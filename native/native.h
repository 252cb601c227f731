// The C interface of vattn's native library, which vattn/driver/native.py loads with ctypes.
//
// A function makes many calls of the system in turn and stops at the first that fails. It returns how many succeeded,
// and says in `failure` which one failed. ctypes gives up Python's lock around it. Nothing here keeps state: whose
// page is where, and what may be called, stays in Python.
#pragma once

#include <cstddef>
#include <cstdint>

struct vattn_failure {
    const char *call;  // the system's name of the call that failed; null where none did
    int32_t code;      // its errno, or its CUresult
};

// Functions of the CUDA driver, as cuGetProcAddress gives them: this library does not link to libcuda. Their structures
// come from cuda-bindings, by address: no layout is repeated here.
struct vattn_cuda {
    int (*create)(unsigned long long *handle, std::size_t size, const void *properties, unsigned long long flags);
    int (*map)(unsigned long long address, std::size_t size, std::size_t offset, unsigned long long handle,
               unsigned long long flags);
    int (*set_access)(unsigned long long address, std::size_t size, const void *descriptions, std::size_t count);
};

#define VATTN_API extern "C" __attribute__((visibility("default")))

// The version of this interface. Raised with every change; Python uses no other than its own.
VATTN_API int32_t vattn_abi();

// Allocate `size` bytes of the file behind each handle, which is an offset plus one.
VATTN_API int64_t vattn_host_create(int fd, uint64_t size, int64_t count, const uint64_t *handles,
                                    vattn_failure *failure);

// Map handle after handle at its address, out of reach of forked children, and then make it readable and writable.
// Both steps count.
VATTN_API int64_t vattn_host_map(int fd, uint64_t size, int64_t count, const uint64_t *addresses,
                                 const uint64_t *handles, vattn_failure *failure);

// `properties`: a CUmemAllocationProp. The new handles are written to `handles`.
VATTN_API int64_t vattn_cuda_create(const vattn_cuda *cuda, const void *properties, uint64_t size, int64_t count,
                                    uint64_t *handles, vattn_failure *failure);

// `access`: one CUmemAccessDesc. cuMemMap and cuMemSetAccess for handle after handle; both count.
VATTN_API int64_t vattn_cuda_map(const vattn_cuda *cuda, const void *access, uint64_t size, int64_t count,
                                 const uint64_t *addresses, const uint64_t *handles, vattn_failure *failure);
