/* The operator library that torch_npu opens by name (libopapi.so): every aclnn kernel succeeds, computes nothing and is recorded.
 *
 * build.py appends one WORKSPACE line per aclnn…GetWorkspaceSize and one KERNEL line per other aclnn name of the wheel. The
 * workspace size stays as the caller initialised it, zero, so that no workspace is allocated. */
#include <stdint.h>

void contract_tensor(int dtype, const int64_t *shape, uint64_t rank, const int64_t *strides);
void contract_ints(const int64_t *values, uint64_t count);
void contract_call(const char *kernel);

static int handle; /* whatever an aclTensor or aclScalar points to: never read */

void *aclCreateTensor(const int64_t *shape, uint64_t rank, int dtype, const int64_t *strides) {
    contract_tensor(dtype, shape, rank, strides);
    return &handle;
}
void *aclCreateIntArray(const int64_t *values, uint64_t count) {
    contract_ints(values, count);
    return &handle;
}
void *aclCreateScalar(void) { return &handle; }
void *aclCreateBoolArray(void) { return &handle; }
void *aclCreateTensorList(void) { return &handle; }
void *aclCreateScalarList(void) { return &handle; }
int aclGetViewShape(const void *tensor, int64_t **shape, uint64_t *rank) {
    (void)tensor;
    *shape = 0;
    *rank = 0;
    return 0;
}
#define ZERO(name) long name(void) { return 0; }
#define KERNEL(name) long name(void) { contract_call(#name); return 0; }

ZERO(aclDestroyTensor)
ZERO(aclDestroyScalar)
ZERO(aclDestroyIntArray)
ZERO(aclDestroyBoolArray)
ZERO(aclDestroyTensorList)
ZERO(aclDestroyScalarList)
ZERO(aclDestroyAclOpExecutor)
ZERO(InitHugeMemThreadLocal)
ZERO(UnInitHugeMemThreadLocal)
ZERO(ReleaseHugeMem)
ZERO(UnInitPTACacheThreadLocal)
