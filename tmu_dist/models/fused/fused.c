/* The arithmetic between convolutions, each formula in one pass over memory.

   Maps are float and lie with their channels innermost, [pixels][channels]; before this text stands
   VECTORS of native.py. Channels are multiples of LANES. No sum is split among threads, so results do
   not depend on their number. */

#include <math.h>

typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec all(float value) { return ZERO + value; }
static inline vec pick(ivec where, vec yes, vec no) {
  return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

/* e^x to a unit in the last place; NaN stays NaN, the rest is held within float's range. */
static inline vec exponential(vec x) {
  x = pick(x < -87.0f, all(-87.0f), x);
  x = pick(x > 88.0f, all(88.0f), x);
  vec magic = all(12582912.0f), n = (x * 1.44269504f + magic) - magic;
  vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f, p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)power;
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

/* A polynomial where 1 - 2 / (e^2x + 1) would cancel. */
static inline vec tangent(vec x) {
  vec z = x * x, p = all(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  p = p * z * x + x;
  vec far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
  return pick(z < 0.390625f, p, far);
}

/* Eq. 2 and the pre-activation of the output gate: gates are the pre-activations of i, f, o, g, side by
   side; peepholes are those of i and f, or missing. */
void propose(const float *gates, const float *memory, const float *peepholes, float forget_bias,
             float *candidate, float *forget, float *output, long pixels, long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long n = 0; n < pixels; n++)
    for (long c = 0; c < P; c += LANES) {
      const float *of = gates + n * 4 * P + c;
      vec m = load(memory + n * P + c), i = load(of), f = load(of + P);
      if (peepholes) i += load(peepholes + c) * m, f += load(peepholes + P + c) * m;
      f = sigmoid(f + forget_bias);
      store(candidate + n * P + c, f * m + sigmoid(i) * tangent(load(of + 3 * P)));
      store(forget + n * P + c, f);
      store(output + n * P + c, load(of + 2 * P));
    }
}

/* Its gradient; d_output goes through unchanged. d_peepholes begins at 0. */
void propose_back(const float *gates, const float *memory, const float *peepholes, float forget_bias,
                  const float *d_candidate, const float *d_output, float *d_gates, float *d_memory,
                  float *d_peepholes, long pixels, long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long c = 0; c < P; c += LANES) {
    vec wi = peepholes ? load(peepholes + c) : ZERO, wf = peepholes ? load(peepholes + P + c) : ZERO;
    vec sum_i = ZERO, sum_f = ZERO;
    for (long n = 0; n < pixels; n++) {
      const float *of = gates + n * 4 * P + c;
      float *to = d_gates + n * 4 * P + c;
      vec m = load(memory + n * P + c), d = load(d_candidate + n * P + c);
      vec i = sigmoid(load(of) + wi * m), f = sigmoid(load(of + P) + wf * m + forget_bias);
      vec g = tangent(load(of + 3 * P));
      vec di = d * g * i * (1.0f - i), df = d * m * f * (1.0f - f);
      store(to, di);
      store(to + P, df);
      store(to + 2 * P, load(d_output + n * P + c));
      store(to + 3 * P, d * i * (1.0f - g * g));
      store(d_memory + n * P + c, d * f + wi * di + wf * df);
      sum_i += di * m;
      sum_f += df * m;
    }
    if (peepholes) store(d_peepholes + c, sum_i), store(d_peepholes + P + c, sum_f);
  }
}

/* Eq. 5, lines 3 and 4: the hidden state, from the output gate's pre-activation and the memory. */
void emit(const float *output, const float *memory, const float *peephole, float *hidden, long pixels,
          long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long n = 0; n < pixels; n++)
    for (long c = 0; c < P; c += LANES) {
      vec m = load(memory + n * P + c), o = load(output + n * P + c);
      if (peephole) o += load(peephole + c) * m;
      store(hidden + n * P + c, sigmoid(o) * tangent(m));
    }
}

void emit_back(const float *output, const float *memory, const float *peephole, const float *d_hidden,
               float *d_output, float *d_memory, float *d_peephole, long pixels, long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long c = 0; c < P; c += LANES) {
    vec w = peephole ? load(peephole + c) : ZERO, sum = ZERO;
    for (long n = 0; n < pixels; n++) {
      vec m = load(memory + n * P + c), d = load(d_hidden + n * P + c);
      vec o = sigmoid(load(output + n * P + c) + w * m), t = tangent(m), dp = d * t * o * (1.0f - o);
      store(d_output + n * P + c, dp);
      store(d_memory + n * P + c, d * o * (1.0f - t * t) + w * dp);
      sum += dp * m;
    }
    if (peephole) store(d_peephole + c, sum);
  }
}

/* Eq. 5, line 2: scale * (C~ + sum_m (a_m C^_m + (1 - a_m) C~)), from the gates' pre-activations; also
   the gates themselves. Teachers' channels lie side by side, [pixels][M * P]. */
void fuse(const float *own, const float *imitations, const float *gates, float scale, float *fused,
          float *open, long pixels, long M, long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long n = 0; n < pixels; n++)
    for (long c = 0; c < P; c += LANES) {
      vec c0 = load(own + n * P + c), sum = c0;
      for (long m = 0; m < M; m++) {
        long k = (n * M + m) * P + c;
        vec a = sigmoid(load(gates + k));
        store(open + k, a);
        sum += c0 + a * (load(imitations + k) - c0);
      }
      store(fused + n * P + c, scale * sum);
    }
}

void fuse_back(const float *own, const float *imitations, const float *open, float scale,
               const float *d_fused, float *d_own, float *d_imitations, float *d_gates, long pixels,
               long M, long P, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long n = 0; n < pixels; n++)
    for (long c = 0; c < P; c += LANES) {
      vec c0 = load(own + n * P + c), d = scale * load(d_fused + n * P + c), kept = all(1.0f);
      for (long m = 0; m < M; m++) {
        long k = (n * M + m) * P + c;
        vec a = load(open + k);
        kept += 1.0f - a;
        store(d_imitations + k, d * a);
        store(d_gates + k, d * (load(imitations + k) - c0) * a * (1.0f - a));
      }
      store(d_own + n * P + c, d * kept);
    }
}

static inline float sum_of(vec v) {
  double sum = 0;
  for (long lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}

/* Each sample's groups of P channels, over all S pixels: y = (x - mean) / deviation * gain + shift.
   Gains and shifts are [S][G * P]; statistics, [N][G][2], are for the backward pass. */
void normalise(const float *x, const float *gain, const float *shift, float *y, float *statistics,
               float epsilon, long N, long S, long G, long P, int threads) {
  const float count = S * P;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long n = 0; n < N; n++)
    for (long g = 0; g < G; g++) {
      const long begin = n * S * G * P + g * P;
      vec sum = ZERO, squares = ZERO;
      for (long s = 0; s < S; s++) {
        vec pixel = ZERO;
        for (long c = 0; c < P; c += LANES) pixel += load(x + begin + s * G * P + c);
        sum += pixel;
      }
      const float mean = sum_of(sum) / count;
      for (long s = 0; s < S; s++) {
        vec pixel = ZERO;
        for (long c = 0; c < P; c += LANES) {
          vec d = load(x + begin + s * G * P + c) - mean;
          pixel += d * d;
        }
        squares += pixel;
      }
      const float scale = 1.0f / sqrtf(sum_of(squares) / count + epsilon);
      statistics[(n * G + g) * 2] = mean;
      statistics[(n * G + g) * 2 + 1] = scale;
      for (long s = 0; s < S; s++)
        for (long c = 0; c < P; c += LANES) {
          long k = s * G * P + g * P + c, at = begin + s * G * P + c;
          store(y + at, (load(x + at) - mean) * scale * load(gain + k) + load(shift + k));
        }
    }
}

void normalise_back(const float *x, const float *gain, const float *statistics, const float *dy,
                    float *dx, float *d_gain, float *d_shift, long N, long S, long G, long P,
                    int threads) {
  const float count = S * P;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2) nowait
    for (long n = 0; n < N; n++)
      for (long g = 0; g < G; g++) {
        const long begin = n * S * G * P + g * P;
        const float mean = statistics[(n * G + g) * 2], scale = statistics[(n * G + g) * 2 + 1];
        vec sum = ZERO, along = ZERO;
        for (long s = 0; s < S; s++) {
          vec pixel = ZERO, pixel_along = ZERO;
          for (long c = 0; c < P; c += LANES) {
            long at = begin + s * G * P + c;
            vec d = load(dy + at) * load(gain + s * G * P + g * P + c);
            pixel += d;
            pixel_along += d * ((load(x + at) - mean) * scale);
          }
          sum += pixel;
          along += pixel_along;
        }
        const float mean_d = sum_of(sum) / count, mean_along = sum_of(along) / count;
        for (long s = 0; s < S; s++)
          for (long c = 0; c < P; c += LANES) {
            long at = begin + s * G * P + c;
            vec d = load(dy + at) * load(gain + s * G * P + g * P + c);
            store(dx + at, scale * (d - mean_d - (load(x + at) - mean) * scale * mean_along));
          }
      }
#pragma omp for
    for (long s = 0; s < S; s++)
      for (long c = 0; c < G * P; c += LANES) {
        vec of_gain = ZERO, of_shift = ZERO;
        for (long n = 0; n < N; n++) {
          const float *of = statistics + (n * G + c / P) * 2;
          long at = (n * S + s) * G * P + c;
          vec d = load(dy + at);
          of_gain += d * ((load(x + at) - of[0]) * of[1]);
          of_shift += d;
        }
        store(d_gain + s * G * P + c, of_gain);
        store(d_shift + s * G * P + c, of_shift);
      }
  }
}
