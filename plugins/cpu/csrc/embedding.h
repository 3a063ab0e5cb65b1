// Rows of the embedding, from a table or from what a table was packed to: a tied output projection is held once.
#pragma once

#include "quant.h"
#include "types.h"

namespace quire {

// Rows `ids` of table [vocabulary, columns]; throws std::out_of_range for an id that is not in it, as all of these.
void embed(const Matrix& table, int64_t vocabulary, int64_t columns, const int64_t* ids, int64_t count,
           const Matrix& out);
// The same bits, from linear's layout of W [n, k] of `type` (linear.h). `out` is of that type.
void embed_packed(const char* packed, int64_t n, int64_t k, DType type, const int64_t* ids, int64_t count,
                  const Matrix& out);
// (q - zero) * scale from the layout of integers (quant.h), rounded to out's type.
void embed_packed(const QuantShape& shape, const char* packed, const int64_t* ids, int64_t count, const Matrix& out);

}  // namespace quire
