#include "core/types.h"

#include <array>

namespace pgk {

std::string format_bytes(std::size_t bytes) {
  if (bytes < KiB) return std::to_string(bytes) + " B";
  constexpr std::array units{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  std::size_t unit = 0;
  std::size_t scale = KiB;
  while (unit + 1 < units.size() && bytes / scale >= KiB) {
    scale *= KiB;
    ++unit;
  }
  const std::size_t hundredths = (bytes % scale) / (scale / KiB) * 100 / KiB;
  const std::string fraction = std::to_string(hundredths);
  return std::to_string(bytes / scale) + "." + (hundredths < 10 ? "0" : "") + fraction + " " +
         units[unit];
}

}  // namespace pgk
