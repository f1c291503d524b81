// Tests of the checksum against published values and against a bit by bit computation.
#include "bank/crc32c.h"

#include "tests/test_case.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>

using longlive::bank::crc32c;
using longlive::bank::crc32c_by_tables;

namespace {

using Bytes = std::vector<unsigned char>;

// The definition, a bit at a time.
std::uint32_t by_bits(const unsigned char* data, std::size_t bytes, std::uint32_t crc = 0) {
  crc = ~crc;
  for (std::size_t i = 0; i < bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82f63b78u : crc >> 1;
  }
  return ~crc;
}

Bytes random_bytes(std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  Bytes data(bytes);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  return data;
}

void check_value(const Bytes& data, std::uint32_t expected) {
  CHECK(crc32c(data.data(), data.size()) == expected);
  CHECK(crc32c_by_tables(data.data(), data.size()) == expected);
  CHECK(by_bits(data.data(), data.size()) == expected);
}

}  // namespace

TEST_CASE(published_values) {
  check_value({}, 0);
  const std::string digits = "123456789";
  check_value(Bytes(digits.begin(), digits.end()), 0xe3069283);
  // RFC 3720, appendix B.4
  check_value(Bytes(32, 0x00), 0x8a9136aa);
  check_value(Bytes(32, 0xff), 0x62a8ab43);
  Bytes ascending(32);
  std::iota(ascending.begin(), ascending.end(), static_cast<unsigned char>(0));
  check_value(ascending, 0x46dd794e);
  check_value(Bytes(ascending.rbegin(), ascending.rend()), 0x113fdb5c);
  check_value({0x01, 0xc0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
               0x14, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00, 0x18,
               0x28, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00},
              0xd9963a56);
}

TEST_CASE(nothing_changes_nothing) {
  CHECK(crc32c(nullptr, 0, 0x12345678) == 0x12345678);
  CHECK(crc32c_by_tables(nullptr, 0, 0x12345678) == 0x12345678);
}

// Around the lengths where the computation changes its stride: 8, 3 * 512 and 3 * 8192 bytes.
TEST_CASE(every_length_and_alignment) {
  const Bytes data = random_bytes(3 * 8192 * 2 + 4096, 1);
  std::vector<std::size_t> lengths;
  for (std::size_t n = 0; n <= 64; ++n) lengths.push_back(n);
  for (const std::size_t middle : {512u, 1536u, 3072u, 4096u, 24576u, 26112u, 49152u}) {
    for (std::size_t n = middle - 9; n <= middle + 9; ++n) lengths.push_back(n);
  }
  for (const std::size_t length : lengths) {
    for (std::size_t start = 0; start < 9; ++start) {
      const std::uint32_t expected = by_bits(data.data() + start, length, 7);
      CHECK(crc32c(data.data() + start, length, 7) == expected);
      CHECK(crc32c_by_tables(data.data() + start, length, 7) == expected);
    }
  }
}

TEST_CASE(in_pieces_as_in_one) {
  const Bytes data = random_bytes(200000, 2);
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    const std::size_t start = random() % 5000, length = random() % (data.size() - start);
    const std::uint32_t whole = crc32c_by_tables(data.data() + start, length);
    std::uint32_t pieces = 0;
    for (std::size_t at = 0; at < length;) {
      const std::size_t most = round % 2 == 0 ? 40000 : 700;
      const std::size_t bytes = std::min<std::size_t>(length - at, random() % most + (random() % 4 == 0 ? 0 : 1));
      const auto call = random() % 3 == 0 ? crc32c_by_tables : crc32c;
      pieces = call(data.data() + start + at, bytes, pieces);
      at += bytes;
    }
    CHECK(pieces == whole);
    CHECK(crc32c(data.data() + start, length) == whole);
  }
}

TEST_CASE(every_flipped_bit_shows) {
  Bytes page = random_bytes(4096, 4);
  const std::uint32_t good = crc32c(page.data(), page.size());
  for (std::size_t bit = 0; bit < 8 * page.size(); ++bit) {
    page[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
    CHECK(crc32c(page.data(), page.size()) != good);
    page[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
  }
  CHECK(crc32c(page.data(), page.size()) == good);
}
