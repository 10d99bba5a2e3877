#include "codec_rans.h"
#include "codec_vector.h"

namespace kvasir {

const CodecKernels& avx2_codec_kernels() {
  using Codec = VectorCodec<32>;
  static constexpr CodecKernels kernels{
      .int8_encode = Codec::int8_encode,
      .int8_decode = Codec::int8_decode,
      .int4_encode = Codec::int4_encode,
      .int4_decode = Codec::int4_decode,
      .magnitude = Codec::magnitude,
      .to_levels = Codec::to_levels,
      .from_levels = Codec::from_levels,
      .transpose = Codec::transpose,
      .row_sums = Codec::row_sums,
      .to_symbols = Codec::to_symbols,
      .from_symbols = Codec::from_symbols,
      .rans_encode = rans_encode,
      .rans_decode = rans_decode,
  };
  return kernels;
}

}  // namespace kvasir
