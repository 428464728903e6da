// The multi-frequency step, included by each_isa_cpu.h once per instruction set.
//
//   adamw:  m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2,
//           direction = m / (1 - beta1^i) / (sqrt(v / (1 - beta2^i)) + eps) + decay p
//   sgd:    direction = g + decay p
//   pending += lr direction;   where the parameter is due:  p -= pending,  pending = 0
//
// It is bound by memory, so each tensor is read and written once, and only if it has to be: what
// happens to a parameter in this step is fixed at compile time. The loop is plain and made to be
// vectorised by the compiler; an element's result does not depend on where the loop begins.

enum class MultifreqEnding {
    subtract,  // period 1: nothing is pending before or after
    flush,     // due: what was pending, too
    keep       // not due
};

template <class T>
struct MultifreqScalars {
    T lr, take1, beta2, take2, eps, decay, mean_correction, square_correction;
    explicit MultifreqScalars(const MultifreqParams& p)
        : lr(static_cast<T>(p.lr)),
          take1(static_cast<T>(1 - p.beta1)),
          beta2(static_cast<T>(p.beta2)),
          take2(static_cast<T>(1 - p.beta2)),
          eps(static_cast<T>(p.eps)),
          decay(static_cast<T>(p.weight_decay)),
          mean_correction(static_cast<T>(p.mean_correction)),
          square_correction(static_cast<T>(p.square_correction)) {}
};

// T: what is computed in; P, G: elements of parameter and gradient.
template <class T, class P, class G, Rule kRule, MultifreqEnding kEnding, bool kDecays>
void multifreq_elements(const MultifreqTensor& tensor, const MultifreqParams& params, int64_t begin,
                        int64_t end) {
    const MultifreqScalars<T> s(params);
    P* const __restrict parameter = static_cast<P*>(tensor.parameter);
    const G* const __restrict gradient = static_cast<const G*>(tensor.gradient);
    T* const __restrict pending = static_cast<T*>(tensor.pending);
    T* const __restrict mean = static_cast<T*>(tensor.mean);
    T* const __restrict square = static_cast<T*>(tensor.square);
    for (int64_t i = begin; i < end; i++) {
        const T g = widen<T>(gradient[i]);
        T direction = g, p = 0;
        if constexpr (kRule == Rule::adamw) {
            const T m = mean[i] + s.take1 * (g - mean[i]),
                    v = s.beta2 * square[i] + s.take2 * g * g;
            mean[i] = m, square[i] = v;
            direction = s.mean_correction * m / (square_root(v) * s.square_correction + s.eps);
        }
        if constexpr (kDecays || kEnding != MultifreqEnding::keep) p = widen<T>(parameter[i]);
        if constexpr (kDecays) direction += s.decay * p;
        T change = kEnding == MultifreqEnding::subtract ? T(0) : pending[i];
        change += s.lr * direction;
        if constexpr (kEnding == MultifreqEnding::keep) {
            pending[i] = change;
        } else {
            narrow(p - change, parameter[i]);
            if constexpr (kEnding == MultifreqEnding::flush) pending[i] = 0;
        }
    }
}

template <class T, class P, class G, Rule kRule, MultifreqEnding kEnding>
void multifreq_decaying(const MultifreqTensor& tensor, const MultifreqParams& params, int64_t begin,
                        int64_t end) {
    if (params.weight_decay != 0)
        multifreq_elements<T, P, G, kRule, kEnding, true>(tensor, params, begin, end);
    else
        multifreq_elements<T, P, G, kRule, kEnding, false>(tensor, params, begin, end);
}

template <class T, class P, class G, Rule kRule>
void multifreq_ending(const MultifreqTensor& tensor, const MultifreqParams& params, int64_t begin,
                      int64_t end) {
    if (!tensor.due)
        multifreq_decaying<T, P, G, kRule, MultifreqEnding::keep>(tensor, params, begin, end);
    else if (tensor.pending)
        multifreq_decaying<T, P, G, kRule, MultifreqEnding::flush>(tensor, params, begin, end);
    else
        multifreq_decaying<T, P, G, kRule, MultifreqEnding::subtract>(tensor, params, begin, end);
}

template <class T, class P, class G>
void multifreq_rule(const MultifreqTensor& tensor, const MultifreqParams& params, int64_t begin,
                    int64_t end) {
    if (params.rule == Rule::adamw)
        multifreq_ending<T, P, G, Rule::adamw>(tensor, params, begin, end);
    else
        multifreq_ending<T, P, G, Rule::sgd>(tensor, params, begin, end);
}

// Elements [begin, end) of one parameter.
inline void multifreq_part(const MultifreqTensor& tensor, const MultifreqParams& params,
                           int64_t begin, int64_t end) {
    const bool small_gradient = tensor.gradient_element == Element::bfloat16;
    if (tensor.parameter_element == Element::float64)
        multifreq_rule<double, double, double>(tensor, params, begin, end);
    else if (tensor.parameter_element == Element::float32 && small_gradient)
        multifreq_rule<float, float, BFloat16>(tensor, params, begin, end);
    else if (tensor.parameter_element == Element::float32)
        multifreq_rule<float, float, float>(tensor, params, begin, end);
    else if (small_gradient)
        multifreq_rule<float, BFloat16, BFloat16>(tensor, params, begin, end);
    else
        multifreq_rule<float, BFloat16, float>(tensor, params, begin, end);
}
