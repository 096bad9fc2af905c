// What a wavefront's tables must be before their rows may be written: O(rows + edges), on the host.
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "branch_rows.h"

namespace egrpo {

// An error that the Python loader raises as ValueError, which it knows by its first word.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "branch_rows: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Limits of the tables' own integers, read from shapes alone: no table value is looked at.
inline void check_sizes(const BranchRows& rows) {
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  require(rows.num_rows <= largest, "latents: ", rows.num_rows, " rows, more than int32 tables can name (", largest,
          ")");
  require(rows.num_edges <= largest, "destinations: ", rows.num_edges, " edges, more than int32 offsets can name (",
          largest, ")");
  require(rows.num_sources > 0, "sources: an empty wavefront");
}

// offsets rise from 0 to num_edges; sources and destinations are rows, each named once; no destination is another's
// source; slots name prompts; draws and prompts (where given) are 32-bit words.
inline void check_tables(const BranchRows& rows) {
  check_sizes(rows);
  const auto require_word = [](int64_t word, const char* name, int64_t at) {
    require(0 <= word && word <= std::numeric_limits<uint32_t>::max(), name, "[", at, "] = ", word,
            ", not a 32-bit counter word");
  };
  constexpr int32_t nobody = -1;
  std::vector<int32_t> owner(static_cast<size_t>(rows.num_rows), nobody);  // row -> the source that reads it
  for (int64_t i = 0; i < rows.num_sources; ++i) {
    const int32_t row = rows.sources[i];
    require(inside(row, rows.num_rows), "sources[", i, "] = ", row, ", outside the ", rows.num_rows, " rows");
    require(owner[row] == nobody, "sources[", i, "] = ", row, ", which sources[", owner[row], "] already is");
    owner[row] = static_cast<int32_t>(i);
  }

  require(rows.offsets[0] == 0, "offsets[0] = ", rows.offsets[0], ", expected 0");
  for (int64_t i = 0; i < rows.num_sources; ++i) {
    require(rows.offsets[i] <= rows.offsets[i + 1], "offsets[", i + 1, "] = ", rows.offsets[i + 1],
            ", below offsets[", i, "] = ", rows.offsets[i]);
  }
  require(rows.offsets[rows.num_sources] == rows.num_edges, "offsets[", rows.num_sources,
          "] = ", rows.offsets[rows.num_sources], ", expected the ", rows.num_edges, " edges");

  std::vector<bool> written(static_cast<size_t>(rows.num_rows), false);
  for (int64_t i = 0; i < rows.num_sources; ++i) {
    for (int64_t e = rows.offsets[i]; e < rows.offsets[i + 1]; ++e) {
      const int32_t row = rows.destinations[e];
      require(inside(row, rows.num_rows), "destinations[", e, "] = ", row, ", outside the ", rows.num_rows, " rows");
      require(!written[row], "destinations[", e, "] = ", row, ", overlapping destinations");
      require(owner[row] == nobody || owner[row] == i, "destinations[", e, "] = ", row, " of sources[", i,
              "], which is the row of sources[", owner[row], "]");
      written[row] = true;
      require(inside(rows.slots[e], rows.num_prompts), "slots[", e, "] = ", rows.slots[e], ", outside the ",
              rows.num_prompts, " prompts");
      require_word(rows.draws[e], "draws", e);
    }
  }
  for (int64_t p = 0; rows.prompts && p < rows.num_prompts; ++p) require_word(rows.prompts[p], "prompts", p);
}

}  // namespace egrpo
