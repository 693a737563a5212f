// Stands where nvcc's header of this name would: on the host, CUDA is the emulator.
#pragma once
#include "cuda_emulator.h"
