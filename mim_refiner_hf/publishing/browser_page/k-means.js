// k-means as `mim_refiner_hf.clustering.kmeans` does it (k_means.py, lloyd.py, starts.py,
// confidence.py say why): greedy k-means++ with restarts, of which the worse half is dropped after
// every fourth pass, swaps, strides, empty groups filled, and a confidence that eight second
// clusterings calibrate. The same seed gives the same groups as there, up to 4 096 rows and 99
// groups: of more rows the samples are others, and more groups are there mostly begun along the
// principal directions.

import { apart, columnMeans, dot, matrix, minus } from "./matrices.js";
import { onto, orthonormal, pick, unit } from "./matrices.js";
import { Generator } from "./random.js";

const SAMPLE = 4096;
const PER_GROUP = 40;
const FEWER_PER_GROUP = [[20000, 20], [2 ** 17, 4]];
const DRAWN = 16;
const FULL_RUNS = 30;
const SWAPS = 64;
const WORTH_A_SWAP = 0.1;
const ROUND = 4;
const STRIDE = 1.85;
const MOMENTUM = 0.7;
const WORTH = 2e-4;
const WORTH_A_PASS = 4e-4;
const ENOUGH = 8192;
const SUREST = -80;
const RESAMPLED = 16384;
const FARTHEST = 40;
const PULL = 0.03;
const NEWTON_STEPS = 30;
const RESAMPLE = 2 / 3;
const ALL_ROWS = 4;
const SEEDS = 1000003;

// --- passes

const sum = values => values.reduce((total, value) => total + value, 0);
const inner = (one, two) => dot(one, 0, two, 0, one.length);
const less = (values, steps) => values.map((value, k) => value - steps[k]);

// x . c - ||c||^2 / 2 of one row and all centroids, into `scores`: highest for the nearest
function score(rows, i, centroids, halves, scores) {
  const { d } = rows;
  let best = 0;
  for (let k = 0; k < centroids.n; k++) {
    scores[k] = dot(rows.v, i * d, centroids.v, k * d, d) - halves[k];
    if (scores[k] > scores[best]) best = k;
  }
  return best;
}

function halfSquares({ n, d, v }) {
  return Float64Array.from({ length: n }, (_, k) => dot(v, k * d, v, k * d, d) / 2);
}

// of each row its group, the log odds of it, the squared distance to its centroid
export function membership(rows, centroids, temperature) {
  const { n, d } = rows;
  const labels = new Int32Array(n);
  const logOdds = new Float64Array(n);
  const distances = new Float64Array(n);
  const halves = halfSquares(centroids);
  const scores = new Float64Array(centroids.n);
  for (let i = 0; i < n; i++) {
    const own = score(rows, i, centroids, halves, scores);
    let rivals = 0;
    for (let k = 0; k < centroids.n; k++) {
      const behind = (scores[k] - scores[own]) / temperature;
      if (k !== own) rivals += Math.exp(Math.max(behind, SUREST));
    }
    labels[i] = own;
    logOdds[i] = -Math.log(rivals);
    distances[i] = apart(rows.v, i * d, centroids.v, own * d, d);
  }
  return { labels, logOdds, distances };
}

// the sum of the rows of each group, their number, the inertia
function onePass(rows, centroids) {
  const { n, d } = rows;
  const sums = new Float64Array(centroids.n * d);
  const counts = new Float64Array(centroids.n);
  const halves = halfSquares(centroids);
  const scores = new Float64Array(centroids.n);
  let inertia = 0;
  for (let i = 0; i < n; i++) {
    const own = score(rows, i, centroids, halves, scores);
    for (let k = 0; k < d; k++) sums[own * d + k] += rows.v[i * d + k];
    counts[own] += 1;
    inertia += dot(rows.v, i * d, rows.v, i * d, d) - 2 * scores[own];
  }
  return { sums, counts, inertia };
}

// move into each empty group one of the rows farthest from their own centroids
function fillEmpty(rows, centroids, { sums, counts }) {
  const { d } = rows;
  const empty = [...counts.keys()].filter(k => counts[k] === 0);
  if (!empty.length) return;
  const { labels, distances } = membership(rows, centroids, 1);
  const far = [...labels.keys()].sort((i, j) => distances[j] - distances[i]);
  empty.forEach((group, place) => {
    const i = far[place];
    for (let k = 0; k < d; k++) {
      sums[labels[i] * d + k] -= rows.v[i * d + k];
      sums[group * d + k] = rows.v[i * d + k];
    }
    counts[labels[i]] -= 1;
    counts[group] = 1;
  });
}

// where Lloyd's step would have the centroids, how many rows each had, and the inertia before it
function lloydStep(rows, centroids, spherical) {
  const { n, d } = centroids;
  const found = onePass(rows, centroids);
  const counts = found.counts.slice();
  fillEmpty(rows, centroids, found);
  const means = matrix(n, d);
  for (let k = 0; k < n; k++) {
    for (let j = k * d; j < (k + 1) * d; j++) {
      means.v[j] = found.counts[k] > 0 ? found.sums[j] / found.counts[k] : centroids.v[j];
    }
  }
  const reached = spherical ? unit(means) : means;
  return { centroids, means: reached, counts, inertia: found.inertia };
}

// Lloyd's passes over all rows from one start: the centroids where they stop.
export function bestCentroids(rows, start, iterations, limit, settings = {}) {
  const { worth = -Infinity, spherical = false } = settings;
  let centroids = start;
  for (let step = 1; step <= iterations; step++) {
    const { means, counts, inertia } = lloydStep(rows, centroids, spherical);
    const { d } = means;
    let [shift, gained] = [0, 0];
    counts.forEach((count, k) => {
      const moved = apart(means.v, k * d, centroids.v, k * d, d);
      shift += moved;
      // what moving gains follows from how far, without another pass; on the sphere, at most this
      gained += Math.max(1, count) * moved;
    });
    centroids = means;
    if (shift <= limit || gained < worth * inertia) break;
  }
  return centroids;
}

// Passes whose centroids go farther than Lloyd's: the best run's.
function stride(rows, starts, passes, spherical) {
  let runs = starts.map(centroids => ({ centroids, moved: matrix(centroids.n, centroids.d) }));
  let lowest = [Infinity, Infinity];
  for (let step = 1; step <= passes; step++) {
    const steps = runs.map(run => ({ ...run, ...lloydStep(rows, run.centroids, spherical) }));
    steps.sort((one, two) => one.inertia - two.inertia);
    const [earlier, last] = lowest;
    lowest = [last, Math.min(last, steps[0].inertia)];
    const stalled = lowest[1] >= (1 - WORTH) * earlier;
    if (step === passes || (stalled && steps.length === 1)) return steps[0].means;
    const keep = step % ROUND === 0 ? Math.ceil(steps.length / 2) : steps.length;
    runs = steps.slice(0, keep).map(own => {
      const far = step > 1 ? strided(own, spherical) : own.means;
      return { centroids: far, moved: minusEach(far, own.centroids) };
    });
  }
  return runs[0].centroids;
}

function minusEach(one, two) {
  const { n, d } = one;
  return { n, d, v: one.v.map((value, j) => value - two.v[j]) };
}

function strided({ centroids, means, moved, counts }, spherical) {
  const { n, d } = centroids;
  const far = matrix(n, d);
  for (let j = 0; j < n * d; j++) {
    const way = means.v[j] - centroids.v[j];
    far.v[j] = centroids.v[j] + STRIDE * way + MOMENTUM * moved.v[j];
  }
  const reached = spherical ? unit(far) : far;
  for (let k = 0; k < n; k++) {
    if (counts[k] === 0) reached.v.set(means.v.subarray(k * d, (k + 1) * d), k * d);
  }
  return reached;
}

// --- starts

function startSize(groups) {
  let size = PER_GROUP * groups;
  for (const [rows, perGroup] of FEWER_PER_GROUP) {
    size = Math.min(size, Math.max(rows, perGroup * groups));
  }
  return Math.max(SAMPLE, size);
}

// squared distances from one row, by its number, to all
function distancesIn({ n, d, v }) {
  const squares = Float64Array.from({ length: n }, (_, i) => dot(v, i * d, v, i * d, d));
  return row => {
    const distances = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const cross = dot(v, row * d, v, i * d, d);
      distances[i] = Math.max(0, squares[row] + squares[i] - 2 * cross);
    }
    return distances;
  };
}

// the numbers of rows, each as likely as it is far, by places between 0 and 1
function drawnBy(distances, places) {
  const { length } = distances;
  const mass = new Float64Array(length);
  let total = 0;
  for (let i = 0; i < length; i++) mass[i] = total += distances[i];
  return places.map(place => Math.min(above(mass, place * total), length - 1));
}

// the numbers of the sampled rows that one run starts from
function greedyRows(sample, groups, generator) {
  const { n } = sample;
  const trials = 2 + Math.floor(Math.log(groups));
  const distancesFrom = distancesIn(sample);
  const chosen = [Math.floor(generator.uniform() * n)];
  let nearest = distancesFrom(chosen[0]);
  while (chosen.length < groups) {
    const drawn = trials * Math.min(DRAWN, groups - chosen.length);
    const places = Array.from({ length: drawn }, () => generator.uniformDouble());
    const chances = Array.from({ length: drawn }, () => generator.uniformDouble());
    const candidates = drawnBy(nearest, places);
    const bars = candidates.map((row, i) => chances[i] * nearest[row]);
    const far = candidates.map(distancesFrom);

    // until fewer are left than a step looks at; the first step finds all of them
    let first = 0;
    while (chosen.length < groups) {
      const taken = [];
      for (let i = first; i < drawn && taken.length < trials; i++) {
        if (nearest[candidates[i]] >= bars[i]) taken.push(i);
      }
      if (taken.length < trials) break;
      const lowered = taken.map(i => far[i].map((value, row) => Math.min(value, nearest[row])));
      const totals = lowered.map(sum);
      const best = totals.indexOf(Math.min(...totals));
      nearest = lowered[best];
      chosen.push(candidates[taken[best]]);
      first = taken[taken.length - 1] + 1;
    }
  }
  return chosen;
}

// the first place of a rising list that holds more than `value`
function above(rising, value) {
  let low = 0;
  let high = rising.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rising[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

// of each row the nearest centroid and the next, and the squared distances to them
function nearestTwo(rows, centroids) {
  const { n, d, v } = rows;
  const [labels, rivals] = [new Int32Array(n), new Int32Array(n)];
  const [nearest, second] = [new Float64Array(n), new Float64Array(n)];
  const halves = halfSquares(centroids);
  const scores = new Float64Array(centroids.n);
  for (let i = 0; i < n; i++) {
    const square = dot(v, i * d, v, i * d, d);
    labels[i] = score(rows, i, centroids, halves, scores);
    nearest[i] = Math.max(0, square - 2 * scores[labels[i]]);
    scores[labels[i]] = -Infinity;
    rivals[i] = scores.indexOf(Math.max(...scores));
    second[i] = Math.max(0, square - 2 * scores[rivals[i]]);
  }
  return { labels, rivals, nearest, second };
}

// centroids some of which were swapped for sampled rows that serve better
function swapped(sample, start, generator) {
  const { n, d, v } = sample;
  const centroids = { n: start.n, d, v: start.v.slice() };
  const { labels, rivals, nearest, second } = nearestTwo(sample, start);
  const worth = WORTH_A_SWAP * sum(nearest) / start.n;
  const places = Array.from({ length: SWAPS }, () => generator.uniformDouble());
  const distancesFrom = distancesIn(sample);
  for (const row of drawnBy(nearest, places)) {
    const distances = distancesFrom(row);
    // what the rows of each centroid lose without it
    const losses = new Float64Array(start.n);
    let gained = 0;
    distances.forEach((distance, i) => {
      losses[labels[i]] += Math.min(second[i], distance) - Math.min(nearest[i], distance);
      gained += Math.max(0, nearest[i] - distance);
    });
    const out = losses.indexOf(Math.min(...losses));
    if (gained - losses[out] <= worth) continue;
    centroids.v.set(v.subarray(row * d, (row + 1) * d), out * d);
    for (let i = 0; i < n; i++) {
      // its rows go to the next, and who is next to these is not looked up again
      const gone = labels[i] === out;
      if (gone) [nearest[i], labels[i]] = [second[i], rivals[i]];
      if (gone || rivals[i] === out) second[i] = Infinity;
      if (distances[i] >= nearest[i]) continue;
      [second[i], rivals[i]] = [nearest[i], labels[i]];
      [nearest[i], labels[i]] = [distances[i], out];
    }
  }
  return centroids;
}

// the best restart on a sample, and strides over all rows
function goodStart(rows, sample, groups, { runs, seed, spherical, passes }) {
  const fewRows = Math.max(SAMPLE, sample.n) / sample.n;
  const share = fewRows * (FULL_RUNS / groups) ** 2;
  const begun = Math.min(runs, Math.max(1, Math.floor(runs * share)));
  const generator = new Generator(seed);
  const begin = () => pick(sample, greedyRows(sample, groups, generator));
  const starts = Array.from({ length: begun }, begin);
  const few = ROUND * (Math.floor(Math.log2(begun)) + 1);
  const best = stride(sample, starts, few, spherical);
  const start = groups > FULL_RUNS ? swapped(sample, best, generator) : best;
  return stride(rows, [start], passes, spherical);
}

// --- k-means

// a sample of at most `most` rows, in their order
function sampled(rows, most, seed) {
  if (rows.n <= most) return rows;
  return pick(rows, new Generator(seed).permutation(rows.n).slice(0, most).sort());
}

function firstOf({ n, d, v }, most) {
  return n <= most ? { n, d, v } : { n: most, d, v: v.subarray(0, most * d) };
}

function meanVariance(rows) {
  const { n, d, v } = rows;
  const means = columnMeans(rows);
  return (dot(v, 0, v, 0, n * d) / n - dot(means, 0, means, 0, d)) / d;
}

// variance, per direction, of rows around their own centroids in the space that these span
function varianceBetween(sample, centroids) {
  const { d } = sample;
  const { labels } = membership(sample, centroids, 1);
  const centred = minus(centroids, columnMeans(centroids));
  const longest = Math.sqrt(Math.max(...halfSquares(centred)) * 2);
  const spanned = orthonormal(centred, 1e-5 * longest);
  if (!spanned.n) return 1;
  const residue = matrix(sample.n, d);
  for (let i = 0; i < sample.n; i++) {
    for (let k = 0; k < d; k++) {
      residue.v[i * d + k] = sample.v[i * d + k] - centroids.v[labels[i] * d + k];
    }
  }
  const inside = onto(residue, spanned).v;
  return Math.max(dot(inside, 0, inside, 0, inside.length) / inside.length, 1e-12);
}

// Groups of rows { n, d, v }: labels, centroids, counts, and with `refits` the confidence.
export function kmeans(features, groups, settings = {}) {
  const { runs = 10, iterations = 50, seed = 0, spherical = true } = settings;
  const { refits = 8, tell = () => {} } = settings;
  const rows = spherical ? unit(features) : features;
  const sample = sampled(rows, startSize(groups), seed);
  const limit = 1e-4 * meanVariance(rows);
  const passes = Math.floor(iterations / 2);
  const start = goodStart(rows, sample, groups, { runs, seed, spherical, passes });
  const ending = { worth: Math.min(WORTH_A_PASS, 4e-6 * groups), spherical };
  const centroids = bestCentroids(rows, start, iterations - passes, limit, ending);
  const temperature = varianceBetween(firstOf(sample, ENOUGH), centroids);
  const found = membership(rows, centroids, temperature);
  const counts = new Int32Array(groups);
  for (const label of found.labels) counts[label] += 1;
  tell(1 / (refits + 1));

  let confidence = Float64Array.from(found.logOdds, sigmoid);
  if (refits && groups > 1) {
    const some = sampled(rows, Math.max(RESAMPLED, 16 * groups), seed);
    const again = (part, ownSeed) => {
      const own = { runs, iterations, seed: ownSeed, spherical, refits: 0 };
      const second = kmeans(part, groups, own);
      return membership(some, second.centroids, 1).labels;
    };
    const seconds = secondClusterings(some, groups, again, refits, seed, tell);
    const { labels, logOdds } = membership(some, centroids, temperature);
    const { slope, offsets } = fitted(labels, logOdds, agreement(labels, seconds, groups), groups);
    const sure = (odds, i) => sigmoid(offsets[found.labels[i]] + slope * bounded(odds));
    confidence = found.logOdds.map(sure);
  }
  return { labels: found.labels, centroids, counts, confidence };
}

// --- confidence

const sigmoid = value => 1 / (1 + Math.exp(-value));
const bounded = odds => Math.min(Math.max(odds, -FARTHEST), FARTHEST);

function secondClusterings(sample, groups, again, refits, seed, tell) {
  return Array.from({ length: refits }, (_, refit) => {
    const ownSeed = SEEDS * (seed + 1) + refit;
    let part = sample;
    if (refit % ALL_ROWS) {
      const size = Math.max(groups, Math.round(RESAMPLE * sample.n));
      part = pick(sample, new Generator(ownSeed).permutation(sample.n).subarray(0, size));
    }
    const labels = again(part, ownSeed);
    tell((refit + 2) / (refits + 1));
    return labels;
  });
}

// of each row the share of the second clusterings that leave it in its group
function agreement(labels, seconds, groups) {
  const shares = new Float64Array(labels.length);
  for (const second of seconds) {
    const names = renamed(second, labels, groups);
    labels.forEach((own, i) => { if (names[second[i]] === own) shares[i] += 1 / seconds.length; });
  }
  return shares;
}

// the groups of a second clustering under the names of the first, those that share most rows first
function renamed(second, first, groups) {
  const sizes = new Map();
  first.forEach((own, i) => {
    const cell = second[i] * groups + own;
    sizes.set(cell, (sizes.get(cell) ?? 0) + 1);
  });
  const names = new Int32Array(groups).fill(-1);
  const free = new Uint8Array(groups).fill(1);
  const cells = [...sizes.keys()].sort((one, two) => sizes.get(two) - sizes.get(one) || one - two);
  for (const cell of cells) {
    const group = Math.floor(cell / groups);
    const name = cell % groups;
    if (names[group] < 0 && free[name]) {
      names[group] = name;
      free[name] = 0;
    }
  }
  return names;
}

// a logistic regression of the shares on the log odds, with an offset for each group
function fitted(labels, logOdds, shares, groups) {
  const least = 0.5 / shares.length;
  const own = [...labels, ...Array(groups).keys()];
  const odds = [...logOdds.map(bounded), ...Array(groups).fill(0)];
  const inside = shares.map(share => Math.min(Math.max(share, least), 1 - least));
  const target = [...inside, ...Array(groups).fill(0.5)];
  const found = regression(own, odds, target, groups);
  if (found.slope >= 0) return found;
  return { ...regression(own, odds.map(() => 0), target, groups), slope: 0 };
}

// Newton's method, on standardised log odds
function regression(labels, odds, target, groups) {
  const count = odds.length;
  const centre = sum(odds) / count;
  const scale = Math.max(Math.sqrt(sum(odds.map(value => (value - centre) ** 2)) / count), 1e-6);
  const points = odds.map(value => (value - centre) / scale);
  const pull = PULL * count / groups;
  const logit = (common, own, i) => common[0] + own[labels[i]] + common[1] * points[i];
  const loss = (common, own) => {
    let total = pull / 2 * sum(own.map(value => value * value));
    for (let i = 0; i < count; i++) {
      const value = logit(common, own, i);
      total += Math.max(value, 0) + Math.log1p(Math.exp(-Math.abs(value))) - target[i] * value;
    }
    return total;
  };

  let common = [0, 0];
  let own = new Float64Array(groups);
  let lowest = loss(common, own);
  for (let newton = 0; newton < NEWTON_STEPS; newton++) {
    let [commonStep, ownStep] = newtonStep();
    const after = () => [less(common, commonStep), less(own, ownStep)];
    let reached = loss(...after());
    while (reached > lowest && Math.max(...commonStep.map(Math.abs)) > 1e-9) {
      commonStep = commonStep.map(value => value / 2);
      ownStep = ownStep.map(value => value / 2);
      reached = loss(...after());
    }
    if (reached >= lowest) break;
    [common, own] = after();
    lowest = reached;
  }
  const slope = common[1] / scale;
  return { slope, offsets: own.map(value => common[0] + value - slope * centre) };

  // the Hessian is diagonal in the groups' own offsets, bordered by the two common numbers
  function newtonStep() {
    const diagonal = new Float64Array(groups).fill(pull);
    const border = [new Float64Array(groups), new Float64Array(groups)];
    const ownSlope = own.map(value => pull * value);
    const commonSlope = [0, 0];
    let corner = 0;
    for (let i = 0; i < count; i++) {
      const expected = sigmoid(logit(common, own, i));
      const error = expected - target[i];
      const weight = expected * (1 - expected);
      diagonal[labels[i]] += weight;
      border[0][labels[i]] += weight;
      border[1][labels[i]] += weight * points[i];
      corner += weight * points[i] ** 2;
      ownSlope[labels[i]] += error;
      commonSlope[0] += error;
      commonSlope[1] += error * points[i];
    }
    const solved = border.map(side => side.map((value, k) => value / diagonal[k]));
    const cross = sum(border[1]) - inner(border[0], solved[1]);
    const first = sum(border[0]) - inner(border[0], solved[0]) + 1e-6;
    const last = corner - inner(border[1], solved[1]) + 1e-6;
    const right = solved.map((side, k) => commonSlope[k] - inner(side, ownSlope));
    const determinant = first * last - cross * cross;
    const steps = [
      (last * right[0] - cross * right[1]) / determinant,
      (first * right[1] - cross * right[0]) / determinant,
    ];
    const ownSteps = ownSlope.map((value, k) =>
      (value - border[0][k] * steps[0] - border[1][k] * steps[1]) / diagonal[k]);
    return [steps, ownSteps];
  }
}
