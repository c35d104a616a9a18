// What the level table takes for blocks.cpp.
#pragma once

#include "block_scores_kernel.h"
#include "block_topk_kernel.h"
