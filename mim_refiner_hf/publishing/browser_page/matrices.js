// Rows of numbers in one flat array, and what k-means and the proposal need of linear algebra.
// A matrix is { n, d, v }: n rows of width d, row after row in v.

export const matrix = (n, d, v = new Float32Array(n * d)) => ({ n, d, v });

// the rows of a matrix with these numbers
export function pick(rows, numbers) {
  const { d } = rows;
  const picked = matrix(numbers.length, d);
  numbers.forEach((number, i) => {
    picked.v.set(rows.v.subarray(number * d, (number + 1) * d), i * d);
  });
  return picked;
}

// a . b over `length` numbers, from the places `i` and `j` on
export function dot(a, i, b, j, length) {
  let first = 0, second = 0, third = 0, fourth = 0;
  const end = length - 3;
  let k = 0;
  for (; k < end; k += 4) {
    first += a[i + k] * b[j + k];
    second += a[i + k + 1] * b[j + k + 1];
    third += a[i + k + 2] * b[j + k + 2];
    fourth += a[i + k + 3] * b[j + k + 3];
  }
  for (; k < length; k++) first += a[i + k] * b[j + k];
  return first + second + third + fourth;
}

// squared Euclidean distance
export function apart(a, i, b, j, length) {
  let sum = 0;
  for (let k = 0; k < length; k++) {
    const difference = a[i + k] - b[j + k];
    sum += difference * difference;
  }
  return sum;
}

// a copy whose rows have length 1; rows of zeros stay
export function unit(rows) {
  const { n, d } = rows;
  const scaled = matrix(n, d);
  for (let i = 0; i < n; i++) {
    const length = Math.max(Math.sqrt(dot(rows.v, i * d, rows.v, i * d, d)), 1e-12);
    for (let k = i * d; k < (i + 1) * d; k++) scaled.v[k] = rows.v[k] / length;
  }
  return scaled;
}

export function columnMeans({ n, d, v }) {
  const means = new Float64Array(d);
  for (let i = 0; i < n; i++) for (let k = 0; k < d; k++) means[k] += v[i * d + k] / n;
  return means;
}

export function minus(rows, means) {
  const { n, d } = rows;
  const moved = matrix(n, d);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < d; k++) moved.v[i * d + k] = rows.v[i * d + k] - means[k];
  }
  return moved;
}

// rows (n, d) times directions (m, d): (n, m)
export function onto(rows, directions) {
  const { n, d } = rows;
  const m = directions.n;
  const places = matrix(n, m);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      places.v[i * m + j] = dot(rows.v, i * d, directions.v, j * d, d);
    }
  }
  return places;
}

// the first `m` columns
export function columns({ n, d, v }, m) {
  const width = Math.min(m, d);
  const first = matrix(n, width);
  for (let i = 0; i < n; i++) first.v.set(v.subarray(i * d, i * d + width), i * width);
  return first;
}

// Rows of length 1, at right angles, that span the same space (Gram and Schmidt, twice): those that
// are shorter than `least` once the others are taken off are left out. All in fp64.
export function orthonormal(rows, least) {
  const { n, d } = rows;
  const kept = matrix(0, d, new Float64Array(Math.min(n, d) * d));
  const row = new Float64Array(d);
  for (let i = 0; i < n && kept.n < d; i++) {
    row.set(rows.v.subarray(i * d, (i + 1) * d));
    for (let again = 0; again < 2; again++) {
      for (let j = 0; j < kept.n; j++) {
        const share = dot(row, 0, kept.v, j * d, d);
        for (let k = 0; k < d; k++) row[k] -= share * kept.v[j * d + k];
      }
    }
    const length = Math.sqrt(dot(row, 0, row, 0, d));
    if (!(length > least)) continue;
    for (let k = 0; k < d; k++) kept.v[kept.n * d + k] = row[k] / length;
    kept.n += 1;
  }
  kept.v = kept.v.subarray(0, kept.n * d);
  return kept;
}

// Eigenvalues and eigenvectors (one a row) of a symmetric matrix (d, d), the largest first, by
// Jacobi's rotations.
export function eigen(symmetric) {
  const { d } = symmetric;
  const a = Float64Array.from(symmetric.v);
  const vectors = matrix(d, d, new Float64Array(d * d));
  for (let i = 0; i < d; i++) vectors.v[i * d + i] = 1;
  const scale = Math.sqrt(dot(a, 0, a, 0, d * d));

  for (let sweep = 0; sweep < 30; sweep++) {
    let rest = 0;
    for (let p = 0; p < d; p++) for (let q = 0; q < p; q++) rest += a[p * d + q] ** 2;
    if (Math.sqrt(rest) <= 1e-13 * scale) break;
    for (let p = 0; p < d; p++) {
      for (let q = p + 1; q < d; q++) if (a[p * d + q] !== 0) rotate(a, vectors.v, p, q, d);
    }
  }

  const order = Array.from({ length: d }, (_, i) => i).sort((i, j) => a[j * d + j] - a[i * d + i]);
  return { values: order.map(i => a[i * d + i]), vectors: pick64(vectors, order) };
}

function rotate(a, vectors, p, q, d) {
  const slope = (a[q * d + q] - a[p * d + p]) / (2 * a[p * d + q]);
  const tangent = (slope < 0 ? -1 : 1) / (Math.abs(slope) + Math.sqrt(slope * slope + 1));
  const cosine = 1 / Math.sqrt(tangent * tangent + 1);
  const sine = tangent * cosine;
  const turn = (values, i, j) => {
    const one = values[i];
    const two = values[j];
    values[i] = cosine * one - sine * two;
    values[j] = sine * one + cosine * two;
  };
  for (let k = 0; k < d; k++) turn(a, k * d + p, k * d + q);
  for (let k = 0; k < d; k++) turn(a, p * d + k, q * d + k);
  for (let k = 0; k < d; k++) turn(vectors, p * d + k, q * d + k);
}

function pick64({ d, v }, numbers) {
  const picked = matrix(numbers.length, d, new Float64Array(numbers.length * d));
  numbers.forEach((number, i) => picked.v.set(v.subarray(number * d, (number + 1) * d), i * d));
  return picked;
}

// The `m` main directions (m, d) of centred rows (n, d), the widest first. Of wide rows by powers
// of their scatter matrix on a block that is wider than asked for (Halko et al. 2011).
export function mainDirections(rows, m) {
  const { n, d, v } = rows;
  const scatter = matrix(d, d, new Float64Array(d * d));
  const turned = matrix(d, n);
  for (let i = 0; i < n; i++) for (let k = 0; k < d; k++) turned.v[k * n + i] = v[i * d + k];
  for (let i = 0; i < d; i++) {
    for (let j = 0; j <= i; j++) {
      scatter.v[i * d + j] = scatter.v[j * d + i] = dot(turned.v, i * n, turned.v, j * n, n);
    }
  }
  const wide = m + 32;
  if (d <= wide) return pick64(eigen(scatter).vectors, range(Math.min(m, d)));

  let block = matrix(wide, d, Float64Array.from({ length: wide * d }, (_, i) => Math.sin(i * i)));
  for (let power = 0; power < 40 && block.n; power++) {
    block = orthonormal(times(block, scatter), 0);
  }
  const inside = times(block, scatter);
  const small = matrix(block.n, block.n, new Float64Array(block.n ** 2));
  for (let i = 0; i < block.n; i++) {
    for (let j = 0; j < block.n; j++) {
      small.v[i * block.n + j] = dot(block.v, i * d, inside.v, j * d, d);
    }
  }
  const turns = pick64(eigen(small).vectors, range(Math.min(m, block.n)));
  const directions = matrix(turns.n, d, new Float64Array(turns.n * d));
  for (let i = 0; i < turns.n; i++) {
    for (let j = 0; j < block.n; j++) {
      const share = turns.v[i * block.n + j];
      for (let k = 0; k < d; k++) directions.v[i * d + k] += share * block.v[j * d + k];
    }
  }
  return directions;
}

const range = length => Array.from({ length }, (_, i) => i);

// rows (n, d) times a symmetric matrix (d, d), in fp64
function times(rows, symmetric) {
  const { n, d } = rows;
  const product = matrix(n, d, new Float64Array(n * d));
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < d; k++) product.v[i * d + k] = dot(rows.v, i * d, symmetric.v, k * d, d);
  }
  return product;
}
