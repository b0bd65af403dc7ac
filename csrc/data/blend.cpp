#include "data/blend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "data/fault.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define NEOX_BLEND_AVX512 1
#endif

namespace neox::data {

namespace {

// Built with -ffp-contract=off: a fused multiply-add would round differently and pick other datasets.

// The datasets that take part, and what they have given. Padded to whole vectors with datasets that never lag.
struct Race {
    std::vector<int32_t> dataset;
    std::vector<double> weights, given;  // `given` as numbers of the arithmetic; exact up to 2^53
    std::vector<int64_t> taken;
};

double scale_of(int64_t i) { return static_cast<double>(std::max<int64_t>(i, 1)); }

void run_plain(Race& race, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    for (int64_t i = 0; i < count; ++i) {
        const double scale = scale_of(first + i);
        size_t best = 0;
        double largest = -std::numeric_limits<double>::infinity();
        for (size_t k = 0; k < race.dataset.size(); ++k) {
            const double lag = race.weights[k] * scale - race.given[k];
            if (lag > largest) largest = lag, best = k;
        }
        race.given[best] += 1;
        dataset[i] = race.dataset[best];
        sample[i] = race.taken[best]++;
    }
}

#ifdef NEOX_BLEND_AVX512

constexpr size_t kLanes = 8;
constexpr size_t kWorthVectors = 8;  // datasets; for fewer the plain loop is faster (4: 33 and 14 M samples/s)

#define NEOX_AVX512 __attribute__((target("avx512f,avx512dq")))

NEOX_AVX512 inline __m512d largest_everywhere(__m512d values) {
    values = _mm512_max_pd(values, _mm512_shuffle_f64x2(values, values, 0x4E));
    values = _mm512_max_pd(values, _mm512_shuffle_f64x2(values, values, 0xB1));
    return _mm512_max_pd(values, _mm512_permute_pd(values, 0x55));
}

// Up to 8 x n datasets, all in registers. What bounds the speed is the chain from one sample to the next: lag, largest lag, who has it, one
// more given. The number of the dataset leaves the chain: where one dataset has the largest lag alone, its mask is the next step's.
template <int n>
NEOX_AVX512 void run_in_registers(Race& race, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    __m512d weights[n], given[n], lags[n];
    for (int v = 0; v < n; ++v) weights[v] = _mm512_loadu_pd(&race.weights[kLanes * v]), given[v] = _mm512_loadu_pd(&race.given[kLanes * v]);
    const __m512d one = _mm512_set1_pd(1);
    for (int64_t i = 0; i < count; ++i) {
        const __m512d scale = _mm512_set1_pd(scale_of(first + i));
        for (int v = 0; v < n; ++v) lags[v] = _mm512_sub_pd(_mm512_mul_pd(weights[v], scale), given[v]);
        __m512d largest = lags[0];
        for (int v = 1; v < n; ++v) largest = _mm512_max_pd(largest, lags[v]);
        largest = largest_everywhere(largest);
        uint64_t holders = 0;
        __mmask8 masks[n];
        for (int v = 0; v < n; ++v) {
            masks[v] = _mm512_cmp_pd_mask(lags[v], largest, _CMP_EQ_OQ);
            holders |= static_cast<uint64_t>(masks[v]) << (kLanes * v);
        }
        if (__builtin_expect((holders & (holders - 1)) != 0, 0)) {  // a tie: the first
            const uint64_t alone = holders & (0 - holders);
            for (int v = 0; v < n; ++v) masks[v] = static_cast<__mmask8>(alone >> (kLanes * v));
        }
        for (int v = 0; v < n; ++v) given[v] = _mm512_mask_add_pd(given[v], masks[v], given[v], one);
        const auto best = static_cast<size_t>(__builtin_ctzll(holders));
        dataset[i] = race.dataset[best];
        sample[i] = race.taken[best]++;
    }
    for (int v = 0; v < n; ++v) _mm512_storeu_pd(&race.given[kLanes * v], given[v]);
}

// Any number of datasets.
NEOX_AVX512 void run_in_memory(Race& race, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    const size_t size = race.weights.size();
    std::vector<double> lags(size);
    for (int64_t i = 0; i < count; ++i) {
        const __m512d scale = _mm512_set1_pd(scale_of(first + i));
        __m512d largest = _mm512_set1_pd(-std::numeric_limits<double>::infinity());
        for (size_t k = 0; k < size; k += kLanes) {
            const __m512d lag = _mm512_sub_pd(_mm512_mul_pd(_mm512_loadu_pd(&race.weights[k]), scale), _mm512_loadu_pd(&race.given[k]));
            _mm512_storeu_pd(&lags[k], lag);
            largest = _mm512_max_pd(largest, lag);
        }
        largest = largest_everywhere(largest);
        size_t best = 0;
        for (;; best += kLanes) {
            const __mmask8 holders = _mm512_cmp_pd_mask(_mm512_loadu_pd(&lags[best]), largest, _CMP_EQ_OQ);
            if (holders == 0) continue;
            best += static_cast<size_t>(__builtin_ctz(holders));
            break;
        }
        race.given[best] += 1;
        dataset[i] = race.dataset[best];
        sample[i] = race.taken[best]++;
    }
}

bool run_avx512(Race& race, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    if (race.dataset.size() < kWorthVectors) return false;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")) return false;
    while (race.weights.size() % kLanes != 0) race.weights.push_back(0), race.given.push_back(std::numeric_limits<double>::infinity());
    switch (race.weights.size() / kLanes) {
        case 1:
            return run_in_registers<1>(race, first, count, dataset, sample), true;
        case 2:
            return run_in_registers<2>(race, first, count, dataset, sample), true;
        case 3:
            return run_in_registers<3>(race, first, count, dataset, sample), true;
        case 4:
            return run_in_registers<4>(race, first, count, dataset, sample), true;
        case 5:
            return run_in_registers<5>(race, first, count, dataset, sample), true;
        case 6:
            return run_in_registers<6>(race, first, count, dataset, sample), true;
        default:
            return run_in_memory(race, first, count, dataset, sample), true;
    }
}

#else

bool run_avx512(Race&, int64_t, int64_t, int32_t*, int64_t*) { return false; }

#endif

}  // namespace

void blend(const double* weights, int64_t num_datasets, int64_t first, int64_t count, int64_t* taken, int32_t* dataset, int64_t* sample) {
    Race race;
    for (int64_t k = 0; k < num_datasets; ++k) {
        if (!std::isfinite(weights[k]) || weights[k] < 0)
            throw Fault("bad weight of a dataset").at("dataset " + std::to_string(k)).found(std::to_string(weights[k])).expected("a finite number >= 0");
        if (weights[k] == 0) continue;
        race.dataset.push_back(static_cast<int32_t>(k));
        race.weights.push_back(weights[k]);
        race.given.push_back(static_cast<double>(taken[k]));
        race.taken.push_back(taken[k]);
    }
    if (race.dataset.empty()) throw Fault("no dataset has a weight above 0").found(std::to_string(num_datasets) + " datasets");
    if (!run_avx512(race, first, count, dataset, sample)) run_plain(race, first, count, dataset, sample);
    for (size_t k = 0; k < race.dataset.size(); ++k) taken[race.dataset[k]] = race.taken[k];
}

}  // namespace neox::data
