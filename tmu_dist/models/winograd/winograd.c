/* Winograd's minimal filtering on float maps whose channels lie innermost, [N][H][W][C].

   Before this text stand VECTORS of native.py and, written by kernels.py from the exact matrices:
     TILE, POINTS, PAD and the functions of one axis, y[i * sy] = sum_j matrix[i][j] x[j * sx]:
     input_axis (B^T), input_axis_back (B), output_axis (A^T), output_axis_back (A);
     FILTER_AXIS[POINTS][TAPS] (G).

   Transformed maps are [POINTS * POINTS][rows][channels], a row for every tile; the distance from a
   point to the next is an argument, so that rows can be parts of a longer buffer. Channels of rows
   are padded with zeros to a multiple of LANES.

   Filters are packed in panels of PANEL output channels, [panels][points][in][PANEL], the last one
   narrower. All points of one panel are multiplied and transformed at once, so that products never
   leave the cache: what is read from memory is the filters, in order, and little else.

   Every loop over threads writes disjoint memory and no sum is split among threads, so results do
   not depend on their number. */


#define SQUARE (POINTS * POINTS)
enum { PANEL = COLUMNS * LANES, TAPS = 2 * PAD + 1 };

static inline long padded(long channels) { return (channels + LANES - 1) / LANES * LANES; }
static inline long tiles(long size) { return (size + TILE - 1) / TILE; }

typedef void axis(const vec *x, long sx, vec *y, long sy);

/* Both axes of a square: in [inner][inner] to out [outer][outer]. */
static inline __attribute__((always_inline)) void both_axes(axis *along, const vec *in, long inner,
                                                            vec *out, long outer) {
  vec half[POINTS * POINTS];
  for (long j = 0; j < inner; j++) along(in + j, inner, half + j, inner);
  for (long i = 0; i < outer; i++) along(half + i * inner, 1, out + i * outer, 1);
}

/* to[point][row][offset + c] = B^T d B of every tile of x, channels offset to offset + C of the row;
   then zeros up to `width` if `fill`. */
static void transform_map(const float *x, float *to, long point_stride, long width, long offset,
                          long H, long W, long C, long n, long y, long t, int fill) {
  for (long c = 0; c < C; c += LANES) {
    long count = C - c;
    vec d[SQUARE], u[SQUARE];
    for (long i = 0; i < POINTS; i++)
      for (long j = 0; j < POINTS; j++) {
        long row = y * TILE + i - PAD, column = t * TILE + j - PAD;
        int inside = row >= 0 && row < H && column >= 0 && column < W;
        d[i * POINTS + j] = inside ? load_part(x + ((n * H + row) * W + column) * C + c, count) : ZERO;
      }
    both_axes(input_axis, d, POINTS, u, POINTS);
    for (long p = 0; p < SQUARE; p++) store_part(to + p * point_stride + offset + c, u[p], count);
  }
  if (fill)
    for (long p = 0; p < SQUARE; p++)
      for (long c = offset + C; c < width; c++) to[p * point_stride + c] = 0;
}

/* The maps x and, if it is given, h, as one map of Cx + Ch channels. */
void transform_inputs(const float *x, long Cx, const float *h, long Ch, float *to, long point_stride,
                      long width, long N, long H, long W, int threads) {
#pragma omp parallel for num_threads(threads) collapse(3)
  for (long n = 0; n < N; n++)
    for (long y = 0; y < tiles(H); y++)
      for (long t = 0; t < tiles(W); t++) {
        float *row = to + ((n * tiles(H) + y) * tiles(W) + t) * width;
        transform_map(x, row, point_stride, width, 0, H, W, Cx, n, y, t, !h);
        if (h) transform_map(h, row, point_stride, width, Cx, H, W, Ch, n, y, t, 1);
      }
}

/* to[point][row] = A d A^T of every tile of the output's gradient. */
void transform_gradient(const float *dy, float *to, long point_stride, long width, long N, long H,
                        long W, long C, int threads) {
#pragma omp parallel for num_threads(threads) collapse(3)
  for (long n = 0; n < N; n++)
    for (long y = 0; y < tiles(H); y++)
      for (long t = 0; t < tiles(W); t++) {
        float *row = to + ((n * tiles(H) + y) * tiles(W) + t) * width;
        for (long c = 0; c < width; c += LANES) {
          vec d[TILE * TILE], u[SQUARE];
          for (long i = 0; i < TILE; i++)
            for (long j = 0; j < TILE; j++) {
              long r = y * TILE + i, s = t * TILE + j;
              int inside = r < H && s < W && c < C;
              d[i * TILE + j] = inside ? load_part(dy + ((n * H + r) * W + s) * C + c, C - c) : ZERO;
            }
          both_axes(output_axis_back, d, TILE, u, POINTS);
          for (long p = 0; p < SQUARE; p++) store(row + p * point_stride + c, u[p]);
        }
      }
}

/* LANES filters side by side, in double: each of them is used many times. */
typedef double wide __attribute__((vector_size(8 * LANES)));

/* y = M x M^T, from [inner][inner] to [outer][outer]; M's element (i, t) lies at m + i * si + t * st. */
static inline __attribute__((always_inline)) void both_axes_wide(const double *m, long si, long st,
                                                                 const wide *x, long inner, wide *y,
                                                                 long outer) {
  wide half[POINTS * POINTS];
  for (long i = 0; i < outer; i++)
    for (long j = 0; j < inner; j++) {
      wide sum = {0};
      for (long t = 0; t < inner; t++) sum += m[i * si + t * st] * x[t * inner + j];
      half[i * inner + j] = sum;
    }
  for (long i = 0; i < outer; i++)
    for (long j = 0; j < outer; j++) {
      wide sum = {0};
      for (long t = 0; t < inner; t++) sum += m[j * si + t * st] * half[i * inner + t];
      y[i * outer + j] = sum;
    }
}

/* Filters of D inputs and N outputs, packed: tap (i, j) of the one from d to n lies at
   w + d * sd + n * sn + i * TAPS + j, so inputs and outputs can change places. */
void transform_filters(const float *w, long D, long sd, long N, long sn, float *packed, int threads) {
  long depth = padded(D), width = padded(N);
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long n = 0; n < width; n += LANES)
    for (long d = 0; d < depth; d++) {
      wide g[TAPS * TAPS] = {0}, u[SQUARE];
      if (d < D)
        for (long k = 0; k < min(LANES, N - n); k++)
          for (long t = 0; t < TAPS * TAPS; t++) g[t][k] = w[d * sd + (n + k) * sn + t];
      both_axes_wide(&FILTER_AXIS[0][0], TAPS, 1, g, TAPS, u, POINTS);
      long panel = n / PANEL * PANEL, columns = min(PANEL, width - panel);
      float *to = packed + panel * SQUARE * depth + d * columns + n - panel;
      for (long p = 0; p < SQUARE; p++) store(to + p * depth * columns, __builtin_convertvector(u[p], vec));
    }
}

/* dw [K][C][TAPS][TAPS] = G^T du G, from the gradient of transformed filters [points][in][out]. */
void transform_filters_back(const float *du, float *dw, long C, long K, int threads) {
  long in = padded(C), out = padded(K);
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long k = 0; k < K; k += LANES)
    for (long c = 0; c < C; c++) {
      wide u[SQUARE], g[TAPS * TAPS];
      for (long p = 0; p < SQUARE; p++)
        u[p] = __builtin_convertvector(load(du + (p * in + c) * out + k), wide);
      both_axes_wide(&FILTER_AXIS[0][0], 1, TAPS, u, POINTS, g, TAPS);
      for (long lane = 0; lane < min(LANES, K - k); lane++)
        for (long t = 0; t < TAPS * TAPS; t++)
          dw[((k + lane) * C + c) * TAPS * TAPS + t] = g[t][lane];
    }
}

/* c (+)= a b for a block of at most ROWS x COLUMNS vectors that stays in registers. */
static inline __attribute__((always_inline)) void block(int rows, int columns, const float *a, long ai,
                                                        long ak, const float *b, long ldb, float *c,
                                                        long ldc, long depth, int add) {
  vec sums[ROWS][COLUMNS];
  for (int i = 0; i < rows; i++)
    for (int q = 0; q < columns; q++) sums[i][q] = ZERO;
  for (long k = 0; k < depth; k++) {
    vec line[COLUMNS];
    for (int q = 0; q < columns; q++) line[q] = load(b + k * ldb + q * LANES);
    for (int i = 0; i < rows; i++)
      for (int q = 0; q < columns; q++) sums[i][q] += a[i * ai + k * ak] * line[q];
  }
  for (int i = 0; i < rows; i++)
    for (int q = 0; q < columns; q++) {
      float *to = c + i * ldc + q * LANES;
      store(to, add ? load(to) + sums[i][q] : sums[i][q]);
    }
}

#define BLOCK(r, q) \
  case (r) * 8 + (q): block(r, q, a, ai, ak, b, ldb, c, ldc, depth, add); break;
#define BLOCKS(q) BLOCK(1, q) BLOCK(2, q) BLOCK(3, q) BLOCK(4, q) BLOCK(5, q) BLOCK(6, q)

static void any_block(long rows, long columns, const float *a, long ai, long ak, const float *b,
                      long ldb, float *c, long ldc, long depth, int add) {
  switch (rows * 8 + columns) {
    BLOCKS(1) BLOCKS(2)
#if LANES == 16
    BLOCKS(3) BLOCKS(4)
#endif
  }
}

/* c (+)= a b, [rows][depth] by [depth][columns], at most PANEL columns and a multiple of LANES.
   a's element (i, k) lies at i * ai + k * ak, so a can be transposed. Each part of the depth has its
   own sum: one long sum would round so much that it decided how exact the whole convolution is. */
static void multiply(const float *a, long ai, long ak, const float *b, long ldb, float *c, long ldc,
                     long rows, long columns, long depth, int add) {
  const long part = 64;
  for (long i = 0; i < rows; i += ROWS)
    for (long k = 0; k < depth; k += part)
      any_block(min(ROWS, rows - i), columns / LANES, a + i * ai + k * ak, ai, ak, b + k * ldb, ldb,
                c + i * ldc, ldc, min(part, depth - k), add || k);
}

/* From a point to the next in products [points][rows][columns]: not a power of two, or all points of a
   tile would want the same place in the cache. */
static inline long product_stride(long rows, long columns) { return rows * columns + LANES; }

/* The products of one panel of filters with the rows of images n0 to n1, at all points. */
static void multiply_panel(const float *v, long point_stride, long depth, const float *packed,
                           long columns, float *m, long rows) {
  for (long p = 0; p < SQUARE; p++)
    multiply(v + p * point_stride, depth, 1, packed + p * depth * columns, columns,
             m + p * product_stride(rows, columns), columns, rows, columns, depth, 0);
}

/* Threads share the panels, or if these do not divide among them, the images. */
static long image_groups(long panels, long N, int threads) {
  return panels % threads == 0 ? 1 : min(N, threads);
}

/* y = A^T m A + bias for the images n0 to n1 and the panel's channels, from c0; bias may be missing. */
static void transform_outputs(const float *m, long rows, long columns, const float *bias, float *y,
                              long n0, long n1, long H, long W, long C, long c0) {
  const float *row = m;
  long count = min(columns, C - c0);
  for (long n = n0; n < n1; n++)
    for (long k = 0; k < tiles(H); k++)
      for (long t = 0; t < tiles(W); t++, row += columns)
        for (long c = 0; c < count; c += LANES) {
          vec d[SQUARE], u[TILE * TILE], b = bias ? load_part(bias + c0 + c, count - c) : ZERO;
          for (long p = 0; p < SQUARE; p++) d[p] = load(row + p * product_stride(rows, columns) + c);
          both_axes(output_axis, d, POINTS, u, TILE);
          for (long i = 0; i < TILE; i++)
            for (long j = 0; j < TILE; j++) {
              long r = k * TILE + i, s = t * TILE + j;
              if (r < H && s < W)
                store_part(y + ((n * H + r) * W + s) * C + c0 + c, u[i * TILE + j] + b, count - c);
            }
        }
}

/* Adds the first `count` lanes to channels c, c + 1, ... of two maps that lie one after the other. */
static inline void add_to_maps(float *dx, long Cx, float *dh, long Ch, long pixel, long c, vec v,
                               long count) {
  if (c + min(LANES, count) <= Cx || c >= Cx) {
    float *to = c < Cx ? dx + pixel * Cx + c : dh + pixel * Ch + c - Cx;
    store_part(to, load_part(to, count) + v, count);
    return;
  }
  for (long k = 0; k < min(LANES, count); k++)
    *(c + k < Cx ? dx + pixel * Cx + c + k : dh + pixel * Ch + c + k - Cx) += v[k];
}

/* dx and dh += B m B^T, where tiles overlap; c0 is the first of the panel's channels. */
static void transform_back(const float *m, long rows, long columns, float *dx, long Cx, float *dh,
                           long Ch, long n0, long n1, long H, long W, long c0) {
  const float *row = m;
  long count = min(columns, Cx + Ch - c0);
  for (long n = n0; n < n1; n++)
    for (long y = 0; y < tiles(H); y++)
      for (long t = 0; t < tiles(W); t++, row += columns)
        for (long c = 0; c < count; c += LANES) {
          vec d[SQUARE], u[SQUARE];
          for (long p = 0; p < SQUARE; p++) d[p] = load(row + p * product_stride(rows, columns) + c);
          both_axes(input_axis_back, d, POINTS, u, POINTS);
          for (long i = 0; i < POINTS; i++)
            for (long j = 0; j < POINTS; j++) {
              long r = y * TILE + i - PAD, s = t * TILE + j - PAD;
              if (r < 0 || r >= H || s < 0 || s >= W) continue;
              add_to_maps(dx, Cx, dh, Ch, (n * H + r) * W + s, c0 + c, u[i * POINTS + j], count - c);
            }
        }
}

/* Floats that `convolve` and `convolve_back` need to write to for C output channels. */
long scratch_size(long N, long H, long W, long C, int threads) {
  long groups = image_groups((C + PANEL - 1) / PANEL, N, threads);
  return threads * SQUARE * product_stride((N + groups - 1) / groups * tiles(H) * tiles(W), PANEL);
}

/* From transformed inputs to outputs y of C channels (back = 0), or from transformed gradients of
   outputs to those of the one or two inputs (back = 1), y of C and h of Ch channels, which begin at
   0. `depth` is the width of a row of v. */
void convolve(const float *v, long point_stride, long depth, const float *packed, const float *bias,
              float *scratch, float *y, long C, float *h, long Ch, long N, long H, long W, int back,
              int threads) {
  long width = padded(C + Ch), panels = (width + PANEL - 1) / PANEL;
  long groups = image_groups(panels, N, threads), tiles_each = tiles(H) * tiles(W);
  long size = scratch_size(N, H, W, C + Ch, threads) / threads;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
  for (long j = 0; j < panels; j++)
    for (long g = 0; g < groups; g++) {
      long n0 = N * g / groups, n1 = N * (g + 1) / groups, rows = (n1 - n0) * tiles_each;
      long c = j * PANEL, columns = min(PANEL, width - c);
      float *m = scratch + omp_get_thread_num() * size;
      multiply_panel(v + n0 * tiles_each * depth, point_stride, depth, packed + c * SQUARE * depth,
                     columns, m, rows);
      if (back) transform_back(m, rows, columns, y, C, h, Ch, n0, n1, H, W, c);
      else transform_outputs(m, rows, columns, bias, y, n0, n1, H, W, C, c);
    }
}

/* sum[p] (+)= v[p]^T g[p]: the gradient of transformed filters, [points][in][out]. */
void correlate(const float *v, long v_stride, long in, const float *g, long g_stride, long out,
               float *sum, long rows, int add, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long p = 0; p < SQUARE; p++)
    for (long c = 0; c < out; c += PANEL)
      multiply(v + p * v_stride, 1, in, g + p * g_stride + c, out, sum + p * in * out + c, out, in,
               min(PANEL, out - c), rows, add);
}
