// Choosing each row's next token from its logits, as choose_tokens in reference.py defines it.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace onebase {

struct ChooseTokens {
    const float* logits;       // [rows, vocab]
    const float* temperature;  // [rows], as the four below; 0 takes the best
    const int64_t* top_k;
    const float* top_p;
    const float* min_p;
    const double* uniform;
    int64_t* tokens;  // [rows]
    int64_t rows, vocab;
};

namespace {

struct Candidate {
    float weight;  // e^((logit - best logit) / temperature)
    int32_t token;
};

constexpr int64_t FIRST_SORTED = 64;  // candidates; text is rarely drawn from more

// The heavier first, of equals the first token.
inline bool comes_before(const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

float best_logit(const float* logits, int64_t vocab) {
    F32x16 most = broadcast(-__builtin_inff());
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES) most = max(most, load(logits + i));
    float best = most[0];
    for (int lane = 1; lane < LANES; lane++) best = std::max(best, most[lane]);
    for (; i < vocab; i++) best = std::max(best, logits[i]);
    return best;
}

int64_t first_best(const float* logits, int64_t vocab, float best) {
    return std::find(logits, logits + vocab - 1, best) - logits;
}

// The tokens whose weight is `least` or more, and more than nothing.
void weigh(const float* logits, int64_t vocab, float best, float temperature, float least,
           std::vector<Candidate>& candidates) {
    candidates.clear();
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int64_t count = std::min(LANES, vocab - i);
        F32x16 chunk = broadcast(-__builtin_inff());
        std::memcpy(&chunk, logits + i, count * sizeof(float));
        const F32x16 weights = exp((chunk - best) / temperature);
        for (int64_t lane = 0; lane < count; lane++)
            if (weights[lane] > 0 && weights[lane] >= least) candidates.push_back({weights[lane], int32_t(i + lane)});
    }
}

double total_weight(const std::vector<Candidate>& candidates, size_t count) {
    double total = 0;
    for (size_t i = 0; i < count; i++) total += candidates[i].weight;
    return total;
}

// The first of the candidates at which the weight of all so far exceeds `uniform` of their total.
int64_t draw(const std::vector<Candidate>& candidates, size_t count, double uniform) {
    const double threshold = uniform * total_weight(candidates, count);
    double so_far = 0;
    for (size_t i = 0; i < count; i++)
        if ((so_far += candidates[i].weight) > threshold) return candidates[i].token;
    return candidates[count - 1].token;
}

// How many of the heaviest top-p and min-p leave; these are sorted then. Only as many are sorted as it takes: the best
// few, then four times as many, until their weight is enough.
size_t sort_kept(std::vector<Candidate>& candidates, double enough, float least) {
    double so_far = 0;
    size_t kept = 0, sorted = 0;
    for (size_t next = FIRST_SORTED; kept < candidates.size(); next *= 4) {
        const size_t stop = std::min(next, candidates.size());
        std::partial_sort(candidates.begin() + sorted, candidates.begin() + stop, candidates.end(), comes_before);
        for (sorted = stop; kept < sorted; kept++) {
            if (kept > 0 && (so_far >= enough || candidates[kept].weight < least)) return kept;
            so_far += candidates[kept].weight;
        }
    }
    return kept;
}

int64_t choose(const ChooseTokens& call, int64_t row, std::vector<Candidate>& candidates) {
    const float* logits = call.logits + row * call.vocab;
    const float best = best_logit(logits, call.vocab), min_p = call.min_p[row], top_p = call.top_p[row];
    const size_t top_k = call.top_k[row];
    if (call.temperature[row] == 0) return first_best(logits, call.vocab, best);
    const bool is_ranked = top_k > 0 || top_p < 1;
    weigh(logits, call.vocab, best, call.temperature[row], is_ranked ? 0 : min_p, candidates);
    if (candidates.empty()) return first_best(logits, call.vocab, best);  // the best is infinite, or no number
    if (!is_ranked) return draw(candidates, candidates.size(), call.uniform[row]);
    if (top_k > 0 && top_k < candidates.size()) {
        std::nth_element(candidates.begin(), candidates.begin() + top_k, candidates.end(), comes_before);
        candidates.resize(top_k);
    }
    const double enough = double(top_p) * total_weight(candidates, candidates.size());
    return draw(candidates, sort_kept(candidates, enough, min_p), call.uniform[row]);
}

}  // namespace
}  // namespace onebase

ONEBASE_EXPORT void onebase_choose_tokens(const onebase::ChooseTokens* call) {
    onebase::parallel(call->rows, [&](int64_t first, int64_t last) {
        thread_local std::vector<onebase::Candidate> candidates;
        for (int64_t row = first; row < last; row++) call->tokens[row] = onebase::choose(*call, row, candidates);
    });
}
