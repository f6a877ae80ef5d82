// From features to groups: how many (cluster_count.py says why), which, and how they are shown.
// The same rule as `mim_refiner_hf.clustering.propose_num_clusters`, and the same random numbers.

import { bestCentroids, kmeans, membership } from "./k-means.js";
import { apart, columnMeans, columns, dot, mainDirections } from "./matrices.js";
import { matrix, minus, onto, pick, unit } from "./matrices.js";
import { Generator } from "./random.js";

const COMPONENTS = 64;
const FEW_COMPONENTS = 16;
const RUNS = 2;
const PASSES = 6;
const PAIRS = 3;
const SILHOUETTE_ROWS = 1500;
const FEWEST_ROWS = 20;
const MOST_GROUPS = 100;
const PER_GROUP = 10;
const NEAR = 0.9;
const STABLE = 0.8;
const ABOVE_CLOUD = 1.4;
const WIDEST = 1.5;
const MAX_SAMPLES = 5000;
const MAX_GUESS = 20;

const range = (start, length) => Array.from({ length }, (_, i) => start + i);

// --- how many groups

// agreement of two groupings of the same rows: 1 when equal, about 0 by chance
function adjustedRand(first, second) {
  const pairs = count => count * (count - 1) / 2;
  const tally = keys => {
    const counts = new Map();
    for (const key of keys) counts.set(key, (counts.get(key) ?? 0) + 1);
    return [...counts.values()].reduce((total, count) => total + pairs(count), 0);
  };
  const both = tally(Array.from(first, (label, i) => label * 1000 + second[i]));
  const one = tally(first);
  const two = tally(second);
  const chance = one * two / pairs(first.length);
  const highest = (one + two) / 2;
  return highest === chance ? 1 : (both - chance) / (highest - chance);
}

function mutualDistances(rows) {
  const few = Math.min(rows.n, SILHOUETTE_ROWS);
  const distances = matrix(few, few);
  for (let i = 0; i < few; i++) {
    for (let j = 0; j < i; j++) {
      const distance = Math.sqrt(apart(rows.v, i * rows.d, rows.v, j * rows.d, rows.d));
      distances.v[i * few + j] = distances.v[j * few + i] = distance;
    }
  }
  return distances;
}

// mean silhouette, -1 to 1
function silhouette({ n, v }, labels, groups) {
  const counts = new Float64Array(groups);
  for (let i = 0; i < n; i++) counts[labels[i]] += 1;
  let total = 0;
  for (let i = 0; i < n; i++) {
    const sums = new Float64Array(groups);
    for (let j = 0; j < n; j++) sums[labels[j]] += v[i * n + j];
    const own = sums[labels[i]] / Math.max(counts[labels[i]] - 1, 1);
    let other = Infinity;
    for (let k = 0; k < groups; k++) {
      if (k !== labels[i] && counts[k]) other = Math.min(other, sums[k] / counts[k]);
    }
    const counted = counts[labels[i]] > 1 && other < Infinity;
    if (counted) total += (other - own) / Math.max(other, own, 1e-12);
  }
  return total / n;
}

// Ward's tree over groups: lines of the two numbers that are joined
function mergeTree({ centroids, counts }) {
  const { n, d } = centroids;
  const places = Float64Array.from(centroids.v);
  const sizes = Float64Array.from(counts);
  const numbers = range(0, n);
  const cost = (i, j) => {
    const weight = sizes[i] * sizes[j] / Math.max(sizes[i] + sizes[j], 1);
    return apart(places, i * d, places, j * d, d) * weight;
  };
  const added = new Float64Array(n * n).fill(Infinity);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) if (i !== j) added[i * n + j] = cost(i, j);
  }

  return range(0, n - 1).map(line => {
    let least = 0;
    for (let cell = 1; cell < n * n; cell++) if (added[cell] < added[least]) least = cell;
    const kept = Math.floor(least / n);
    const gone = least % n;
    const pair = [numbers[kept], numbers[gone]];
    const size = sizes[kept] + sizes[gone];

    // the union takes the place of the first
    for (let k = 0; k < d; k++) {
      const weighted = sizes[kept] * places[kept * d + k] + sizes[gone] * places[gone * d + k];
      places[kept * d + k] = weighted / Math.max(size, 1);
    }
    sizes[kept] = size;
    numbers[kept] = n + line;
    for (let i = 0; i < n; i++) {
      if (added[kept * n + i] < Infinity) added[kept * n + i] = added[i * n + kept] = cost(kept, i);
      added[gone * n + i] = added[i * n + gone] = Infinity;
    }
    return pair;
  });
}

// for each old group its new one, numbered in the order of their first old group
function cutTree(tree, groups) {
  const total = tree.length + 1;
  let owner = range(0, total);
  tree.slice(0, total - groups).forEach((pair, line) => {
    owner = owner.map(number => pair.includes(number) ? total + line : number);
  });
  const names = [...new Set(owner)];
  return owner.map(number => names.indexOf(number));
}

// k-means of the same points into any number of groups up to `most`: a cut of Ward's tree, improved
function grouper(points, most, seed) {
  const { n, d, v } = points;
  const settings = { runs: RUNS, iterations: PASSES, seed, spherical: false, refits: 0 };
  const small = kmeans(points, most, settings);
  const tree = mergeTree(small);
  const means = columnMeans(points);
  const variance = (dot(v, 0, v, 0, n * d) - n * dot(means, 0, means, 0, d)) / (n - 1) / d;
  return groups => {
    const names = cutTree(tree, groups);
    const starts = matrix(groups, d);
    const counts = new Float64Array(groups);
    const sums = new Float64Array(groups * d);
    for (let i = 0; i < n; i++) {
      const own = names[small.labels[i]];
      counts[own] += 1;
      for (let k = 0; k < d; k++) sums[own * d + k] += v[i * d + k];
    }
    for (let j = 0; j < groups * d; j++) {
      starts.v[j] = sums[j] / Math.max(counts[Math.floor(j / d)], 1);
    }
    return bestCentroids(points, starts, PASSES, 1e-4 * variance);
  };
}

// the evidence on any number of groups of centred points
function measures(points, most, seed) {
  const all = grouper(points, most, seed);
  const distances = mutualDistances(columns(points, FEW_COMPONENTS));
  const pairs = range(0, PAIRS).map(pair => {
    const order = new Generator(seed + pair).permutation(points.n);
    const middle = Math.ceil(points.n / 2);
    const halves = [order.subarray(0, middle), order.subarray(middle)];
    return halves.map(half => grouper(pick(points, half), most, seed));
  });
  return k => {
    const { labels } = membership(points, all(k), 1);
    const agreements = pairs.map(halves => {
      const [first, second] = halves.map(half => membership(points, half(k), 1).labels);
      return adjustedRand(first, second);
    });
    const stability = agreements.reduce((total, one) => total + one, 0) / PAIRS;
    const apartness = silhouette(distances, labels, k);
    const score = Math.max(0, stability) * Math.max(0, apartness);
    return { k, stability, silhouette: apartness, score };
  };
}

// 2 to 10, then in steps of about a quarter, up to `most`
function coarse(most) {
  const numbers = range(2, Math.min(10, most) - 1);
  while (numbers.at(-1) < most) numbers.push(Math.min(most, Math.ceil(1.22 * numbers.at(-1))));
  return numbers;
}

const best = entries => entries.reduce((high, entry) => entry.score > high.score ? entry : high);

// entries of all numbers, and of those left out on either side of the best
function search(measure, numbers, tell) {
  const entries = new Map();
  const add = k => { if (!entries.has(k)) entries.set(k, measure(k)); };
  numbers.forEach((k, place) => { add(k); tell((place + 1) / numbers.length); });
  const place = numbers.indexOf(best([...entries.values()]).k);
  const low = numbers[Math.max(0, place - 1)];
  const high = numbers[Math.min(numbers.length - 1, place + 1)];
  for (let k = low + 1; k < high; k++) add(k);
  return [...entries.values()].sort((one, two) => one.k - two.k);
}

// the interval, and what speaks against the best guess ("" for nothing)
function judge(entries, guess, cloud) {
  const near = entries.filter(entry => entry.score >= NEAR * guess.score).map(entry => entry.k);
  const low = Math.min(...near);
  const high = Math.max(...near);
  let against = "";
  if (guess.stability < STABLE) {
    const agreement = `${guess.stability.toFixed(2)}, of 1`;
    against = `groups learnt from other halves of the rows agree only to ${agreement}`;
  } else if (guess.score < ABOVE_CLOUD * cloud.score) {
    against = "one cloud without groups, of the same variances, scores nearly as high";
  } else if (high > Math.max(WIDEST * low, low + 1)) {
    against = `${low} to ${high} groups are as stable and as separate as ${guess.k}`;
  }
  return { interval: [low, high], against };
}

// a normal cloud of the same variances, which has no groups
function cloudLike(points, seed) {
  const { n, d, v } = points;
  const means = columnMeans(points);
  const spread = new Float64Array(d);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < d; k++) spread[k] += (v[i * d + k] - means[k]) ** 2 / (n - 1);
  }
  const drawn = new Generator(seed).normal(n * d);
  return matrix(n, d, drawn.map((value, j) => value * Math.sqrt(spread[j % d])));
}

// Propose a number of groups: { number or null, clear, reason, interval, entries }.
export function propose(features, { seed = 0, tell = () => {} } = {}) {
  const order = new Generator(seed).permutation(features.n).subarray(0, MAX_SAMPLES);
  let rows = unit(pick(features, order));
  rows = minus(rows, columnMeans(rows));
  const none = reason => ({ number: null, interval: null, clear: false, reason, entries: [] });
  if (rows.n < FEWEST_ROWS) {
    return none(`${rows.n} rows are too few to tell; it takes ${FEWEST_ROWS}`);
  }

  const points = onto(rows, mainDirections(rows, COMPONENTS));
  const square = dot(points.v, 0, points.v, 0, points.v.length) / points.v.length;
  if (square < 1e-12) return none("all rows are equal");

  const numbers = coarse(Math.max(2, Math.min(MOST_GROUPS, Math.floor(rows.n / PER_GROUP))));
  const most = numbers.at(-1);
  const entries = search(measures(points, most, seed), numbers, share => tell(0.8 * share));
  const guess = best(entries);
  const cloud = measures(cloudLike(points, seed), most, seed)(guess.k);
  tell(1);

  const { interval, against } = judge(entries, guess, cloud);
  if (guess.score <= 0) {
    return { ...none(`no number of groups is both stable and separate: ${against}`), entries };
  }
  const agreement = `${guess.stability.toFixed(2)}, of 1, and lie apart`;
  const reason = against || `groups learnt from other halves of the rows agree to ${agreement}`;
  return { number: guess.k, interval, clear: !against, reason, entries };
}

// --- which groups

// Groups of features { n, d, v }, the largest first, as many as asked for or (null) as proposed:
// { labels, confidence, sizes, reason }.
export function findGroups(features, asked, { seed = 0, tell = () => {} } = {}) {
  let number = asked;
  let reason = "as asked for";
  if (asked === null) {
    const why = propose(features, { seed, tell: share => tell("counting groups", share) });
    const thumb = Math.min(Math.max(Math.round(Math.sqrt(features.n / 2)), 1), MAX_GUESS);
    number = why.number ?? thumb;
    const source = why.number ? "the best guess" : "a rule of thumb, sqrt(n / 2)";
    reason = why.clear ? why.reason : `no clear answer (${why.reason}); ${number} is ${source}`;
  }
  const settings = { seed, tell: share => tell("grouping", share) };
  const { labels, counts, confidence } = kmeans(features, number, settings);

  const filled = range(0, number).filter(k => counts[k]);
  const order = filled.sort((one, two) => counts[two] - counts[one] || one - two);
  const empty = number - order.length;
  if (empty) reason += `; ${empty} of ${number} groups have no image and are left out`;
  const names = new Int32Array(number);
  order.forEach((old, name) => { names[old] = name; });
  const sizes = order.map(k => counts[k]);
  return { labels: labels.map(label => names[label]), confidence, sizes, reason };
}

// --- how they are shown

// Main components of features (n, m) for search by example and the map: signed bytes on one scale,
// and places in the unit square.
export function components(features, m) {
  const rows = unit(features);
  const means = columnMeans(rows);
  const some = pick(rows, new Generator(0).permutation(rows.n).subarray(0, MAX_SAMPLES));
  const places = onto(minus(rows, means), mainDirections(minus(some, means), m));
  const largest = places.v.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);
  const codes = new Int8Array(rows.n * m);
  for (let i = 0; i < rows.n; i++) {
    for (let k = 0; k < places.d; k++) {
      codes[i * m + k] = Math.round(places.v[i * places.d + k] / largest * 127);
    }
  }
  return { codes, x: inUnit(places, 0), y: inUnit(places, 1) };
}

function inUnit({ n, d, v }, column) {
  const values = range(0, n).map(i => column < d ? v[i * d + column] : 0);
  const low = values.reduce((least, value) => Math.min(least, value), Infinity);
  const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
  return values.map(value => (value - low) / Math.max(high - low, 1e-12));
}
