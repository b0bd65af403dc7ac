// Speculative blending. Each sample depends on all samples before it, but the sequence forgets its state: started from
// different counts with the same sum, two sequences soon choose the same datasets (after 1 to 100 samples with the
// weights of the benchmark). The samples are therefore split into chunks that run in parallel in the lanes of vectors,
// each from guessed counts and a warm-up. A chunk is accepted only if its counts equal those at the end of the previous
// chunk. If not, it is recomputed sample by sample until they are equal, so a wrong guess cannot change the result.
// Built with -ffp-contract=off: a fused multiply-add would round differently and pick other datasets.
#include "data/blend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "data/clones.h"
#include "data/fault.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NEOX_BLEND_LANES 1
// AVX-512 with its mask registers is 10 % slower for many datasets (Zen 4)
#define NEOX_AVX2 __attribute__((target("avx2")))
#endif

namespace neox::data {

namespace {

// The datasets of weight > 0, and the samples taken from each, as doubles: exact up to 2^53.
struct BlendState {
    std::vector<int32_t> dataset;  // ascending
    std::vector<double> weights, given;
};

// Destination of samples: lane l writes from dataset + l x stride and sample + l x stride.
struct Output {
    int32_t* dataset;
    int64_t* sample;
    int64_t stride;
};

void run_serial(BlendState& state, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    for (int64_t i = 0; i < count; ++i) {
        const auto scale = static_cast<double>(std::max<int64_t>(first + i, 1));
        size_t best = 0;
        double largest = -std::numeric_limits<double>::infinity();
        for (size_t k = 0; k < state.dataset.size(); ++k) {
            const double lag = state.weights[k] * scale - state.given[k];
            if (lag > largest) largest = lag, best = k;
        }
        dataset[i] = state.dataset[best];
        sample[i] = static_cast<int64_t>(state.given[best]);
        state.given[best] += 1;
    }
}

#ifdef NEOX_BLEND_LANES

constexpr int kWide = 4, kVectors = 4, kLanes = kWide * kVectors;
constexpr int64_t kFew = 4;      // number of datasets up to which the counts stay in registers
constexpr int64_t kWarmUp = 64;  // samples
// samples per lane; odd multiples of 8, so that lanes write to different cache sets
constexpr int64_t kShortest = 264, kChunk = 2056;
constexpr int64_t kExact = int64_t{1} << 52;  // counts below it can be read from the mantissa of a sum with 2^52

typedef double Numbers __attribute__((vector_size(8 * kWide), aligned(8)));
typedef int64_t Integers __attribute__((vector_size(8 * kWide), aligned(8)));
typedef int32_t Halves __attribute__((vector_size(4 * kWide), aligned(4)));

NEOX_AVX2 inline void set_scales(Numbers (&scale)[kVectors], int64_t first, int64_t spacing) {
    for (int lane = 0; lane < kLanes; ++lane)
        scale[lane / kWide][lane % kWide] = static_cast<double>(first + spacing * lane);
}

// Prefetches the cache lines after the one being written. The hardware prefetcher does not follow that many streams:
// without this, 4 datasets take 1.7 times as long.
inline void fetch_ahead(Output out, int64_t at) {
    __builtin_prefetch(out.dataset + at + 32, 1);
    __builtin_prefetch(out.sample + at + 16, 1);
}

// Transposes four samples of four lanes.
NEOX_AVX2 inline void transpose(Integers (&rows)[kWide]) {
    const Integers low = {0, 4, 2, 6}, high = {1, 5, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
    const Integers a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[0], rows[1], high);
    const Integers c = __builtin_shuffle(rows[2], rows[3], low), d = __builtin_shuffle(rows[2], rows[3], high);
    rows[0] = __builtin_shuffle(a, c, left), rows[1] = __builtin_shuffle(b, d, left);
    rows[2] = __builtin_shuffle(a, c, right), rows[3] = __builtin_shuffle(b, d, right);
}

// Computes `steps` samples (a multiple of 4) of every lane; lane l begins at sample first + l x spacing. `counts` is
// [datasets, lanes].
template <int n>
NEOX_CLONES void run_few(const BlendState& state, double* counts, int64_t first, int64_t spacing, int64_t steps,
                         Output out) {
    Numbers scale[kVectors], weights[n], given[n][kVectors];
    Integers dataset[n], datasets[kVectors][kWide], samples[kVectors][kWide];
    set_scales(scale, first, spacing);
    std::memcpy(given, counts, sizeof given);
    for (int k = 0; k < n; ++k) dataset[k] = Integers{} + state.dataset[k], weights[k] = Numbers{} + state.weights[k];
    for (int64_t step = 0; step < steps; step += kWide) {
        for (int t = 0; t < kWide; ++t) {
            for (int v = 0; v < kVectors; ++v) {
                Numbers largest = weights[0] * scale[v] - given[0][v], sample = given[0][v];
                Integers best = dataset[0];
                for (int k = 1; k < n; ++k) {
                    const Numbers lag = weights[k] * scale[v] - given[k][v];
                    best = lag > largest ? dataset[k] : best;
                    largest = lag > largest ? lag : largest;
                }
                for (int k = 0; k < n; ++k) {
                    sample = best == dataset[k] ? given[k][v] : sample;
                    given[k][v] = best == dataset[k] ? given[k][v] + 1 : given[k][v];
                }
                datasets[v][t] = best;
                samples[v][t] = reinterpret_cast<Integers>(sample + static_cast<double>(kExact)) & (kExact - 1);
                scale[v] += 1;
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            transpose(datasets[v]), transpose(samples[v]);
            for (int e = 0; e < kWide; ++e) {
                const int64_t at = (v * kWide + e) * out.stride + step;
                fetch_ahead(out, at);
                const Halves narrow = __builtin_convertvector(datasets[v][e], Halves);
                std::memcpy(out.dataset + at, &narrow, sizeof narrow);
                std::memcpy(out.sample + at, &samples[v][e], sizeof samples[v][e]);
            }
        }
    }
    std::memcpy(counts, given, sizeof given);
}

// The same for any number of datasets: counts are in memory, and only those of the chosen dataset are written.
NEOX_AVX2 void run_many(const BlendState& state, double* counts, int64_t first, int64_t spacing, int64_t steps,
                        Output out) {
    Numbers scale[kVectors];
    set_scales(scale, first, spacing);
    const auto n = static_cast<int64_t>(state.dataset.size());
    const auto* given = reinterpret_cast<const Numbers*>(counts);
    for (int64_t step = 0; step < steps; ++step) {
        Numbers largest[kVectors];
        Integers best[kVectors];
        for (int v = 0; v < kVectors; ++v) largest[v] = state.weights[0] * scale[v] - given[v], best[v] = Integers{};
        for (int64_t k = 1; k < n; ++k) {
            for (int v = 0; v < kVectors; ++v) {
                const Numbers lag = state.weights[k] * scale[v] - given[k * kVectors + v];
                best[v] = lag > largest[v] ? Integers{} + k : best[v];
                largest[v] = lag > largest[v] ? lag : largest[v];
            }
        }
        for (int v = 0; v < kVectors; ++v) scale[v] += 1;
        if (step % 8 == 0)
            for (int lane = 0; lane < kLanes; ++lane) fetch_ahead(out, lane * out.stride + step);
        int64_t chosen[kLanes];
        std::memcpy(chosen, best, sizeof chosen);
        for (int lane = 0; lane < kLanes; ++lane) {
            double& count = counts[chosen[lane] * kLanes + lane];
            out.dataset[lane * out.stride + step] = state.dataset[chosen[lane]];
            out.sample[lane * out.stride + step] = static_cast<int64_t>(count);
            count += 1;
        }
    }
}

void run_lanes(const BlendState& state, std::vector<double>& given, int64_t first, int64_t spacing, int64_t steps,
               Output out) {
    using Run = void(const BlendState&, double*, int64_t, int64_t, int64_t, Output);
    static constexpr Run* kRuns[] = {run_many, run_few<1>, run_few<2>, run_few<3>, run_few<4>};
    kRuns[state.dataset.size() <= kFew ? state.dataset.size() : 0](state, given.data(), first, spacing, steps, out);
}

// Guesses the counts before sample `first` into one lane of `given`: the integer part of each share, plus one for the
// largest remainders (Hamilton's method).
void guess(const BlendState& state, int64_t first, int lane, std::vector<double>& given) {
    const size_t n = state.dataset.size();
    std::vector<std::pair<double, size_t>> rests(n);  // negative, so that the first wins a tie
    double left = static_cast<double>(first);
    for (size_t k = 0; k < n; ++k) {
        const double share = state.weights[k] * static_cast<double>(first), whole = std::floor(share);
        given[k * kLanes + lane] = whole;
        rests[k] = {whole - share, k};
        left -= whole;
    }
    const auto more = static_cast<size_t>(std::min(std::max(left, 0.0), static_cast<double>(n)));
    std::nth_element(rests.begin(), rests.begin() + static_cast<int64_t>(more), rests.end());
    for (size_t i = 0; i < more; ++i) given[rests[i].second * kLanes + lane] += 1;
}

// Recomputes a chunk from the true counts until they equal those of the lane that started it from `begin`. From there
// on the lane's samples are right, and so are its counts at `end`. Returns the number of recomputed samples.
int64_t correct(BlendState& state, const std::vector<double>& begin, const std::vector<double>& end, int lane,
                int64_t first, int64_t count, Output out) {
    const size_t n = state.dataset.size();
    std::vector<double> ahead(n);  // counts of the lane
    double apart = 0;
    for (size_t k = 0; k < n; ++k) {
        ahead[k] = state.given[k] - begin[k * kLanes + lane];
        apart += std::abs(ahead[k]);
    }
    const auto move = [&](int32_t dataset, double by) {
        double& distance =
            ahead[std::lower_bound(state.dataset.begin(), state.dataset.end(), dataset) - state.dataset.begin()];
        apart -= std::abs(distance);
        apart += std::abs(distance += by);
    };
    int64_t i = 0;
    for (; i < count && apart != 0; ++i) {
        move(out.dataset[i], -1);
        run_serial(state, first + i, 1, out.dataset + i, out.sample + i);
        move(out.dataset[i], 1);
    }
    if (apart == 0)
        for (size_t k = 0; k < n; ++k) state.given[k] = end[k * kLanes + lane];
    return i;
}

// Writes as many samples as fill the lanes evenly and returns their number; fewer if many had to be recomputed.
int64_t run_speculatively(BlendState& state, int64_t first, int64_t count, int32_t* dataset, int64_t* sample) {
    const size_t n = state.dataset.size();
    const double most = *std::max_element(state.given.begin(), state.given.end()),
                 least = *std::min_element(state.given.begin(), state.given.end());
    if (!__builtin_cpu_supports("avx2") || least < 0 || most > kExact / 4 || first > kExact / 4 || count > kExact / 4)
        return 0;
    std::vector<double> given(n * kLanes), begin;
    std::vector<int32_t> unused_datasets(kLanes * kWarmUp);
    std::vector<int64_t> unused_samples(kLanes * kWarmUp);
    int64_t done = 0, corrected = 0;
    while ((count - done) / kLanes >= kShortest && corrected <= done / 2) {
        const int64_t start = first + done, chunk = (std::min(kChunk, (count - done) / kLanes) - 8) / 16 * 16 + 8;
        for (int lane = 1; lane < kLanes; ++lane) guess(state, start + lane * chunk - kWarmUp, lane, given);
        run_lanes(state, given, start - kWarmUp, chunk, kWarmUp,
                  {unused_datasets.data(), unused_samples.data(), kWarmUp});
        // the first lane starts from the true counts
        for (size_t k = 0; k < n; ++k) given[k * kLanes] = state.given[k];
        begin = given;
        run_lanes(state, given, start, chunk, chunk, {dataset + done, sample + done, chunk});
        for (int lane = 0; lane < kLanes; ++lane, done += chunk)
            corrected += correct(state, begin, given, lane, first + done, chunk, {dataset + done, sample + done, 0});
    }
    return done;
}

#else

int64_t run_speculatively(BlendState&, int64_t, int64_t, int32_t*, int64_t*) { return 0; }

#endif

}  // namespace

void blend(const double* weights, int64_t num_datasets, int64_t first, int64_t count, int64_t* taken, int32_t* dataset,
           int64_t* sample) {
    BlendState state;
    for (int64_t k = 0; k < num_datasets; ++k) {
        if (!std::isfinite(weights[k]) || weights[k] < 0)
            throw Fault("bad weight of a dataset")
                .at("dataset " + std::to_string(k))
                .found(std::to_string(weights[k]))
                .expected("a finite number >= 0");
        if (weights[k] == 0) continue;
        state.dataset.push_back(static_cast<int32_t>(k));
        state.weights.push_back(weights[k]);
        state.given.push_back(static_cast<double>(taken[k]));
    }
    if (state.dataset.empty())
        throw Fault("no dataset has a weight above 0").found(std::to_string(num_datasets) + " datasets");
    const int64_t head = first == 0 ? std::min<int64_t>(count, 1) : 0;  // sample 0 has a different scale
    run_serial(state, first, head, dataset, sample);
    const int64_t done = head + run_speculatively(state, first + head, count - head, dataset + head, sample + head);
    run_serial(state, first + done, count - done, dataset + done, sample + done);
    for (size_t k = 0; k < state.dataset.size(); ++k) taken[state.dataset[k]] = static_cast<int64_t>(state.given[k]);
}

}  // namespace neox::data
