#pragma GCC target("avx2")
#include "shorts_avx2.h"

#include "encode.h"

void moeq::encode_avx2(const EncodeCall& call) { encode_tiles(call); }
