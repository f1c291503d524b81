// CRC-32C (Castagnoli, RFC 3720 appendix B.4), by the processor's instruction where it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longlive::bank {

// Of `bytes` bytes; `crc` is the checksum of what came before them, 0 at the start.
std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t crc = 0);

}  // namespace longlive::bank
