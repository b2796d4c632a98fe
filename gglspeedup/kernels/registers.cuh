// The most registers that a kernel's threads may have, so that a multiprocessor holds more warps. The
// compiler spills if it must, which tests/test_desk.py does not let pass.
#ifdef __CUDA_ARCH__
#define REGISTERS(count) __maxnreg__(count)
#else
#define REGISTERS(count)
#endif
