// From decoded pixels to what the encoder reads, as its preprocessor_config.json says: resized as
// Pillow and torchvision do it (with antialiasing, which a canvas does not have), cut from the
// centre, normalised.

const sinc = x => x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
const cubic = x => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2;

// by Pillow's number: how far the filter reaches, and its height at a distance
const FILTERS = {
  1: { reach: 3, height: x => sinc(x) * sinc(x / 3) },
  2: { reach: 1, height: x => 1 - x },
  3: { reach: 2, height: cubic },
  4: { reach: 0.5, height: () => 1 },
  5: { reach: 1, height: x => sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) },
};
const NEAREST = 0;

// of the output pixels from `first` on: where their input pixels begin, and the weights of these
function weights(size, wanted, first, count, resample) {
  const scale = size / wanted;
  if (resample === NEAREST || size === wanted) {
    const at = i => Math.min(size - 1, Math.floor((first + i) * scale));
    return Array.from({ length: count }, (_, i) => ({ start: at(i), shares: [1] }));
  }
  const { reach, height } = FILTERS[resample];
  const stretch = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    const centre = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - reach * stretch + 0.5));
    const end = Math.min(size, Math.trunc(centre + reach * stretch + 0.5));
    const heights = [];
    for (let j = start; j < end; j++) {
      const distance = Math.abs((j - centre + 0.5) / stretch);
      heights.push(distance < reach || resample === 4 ? height(distance) : 0);
    }
    const total = heights.reduce((sum, value) => sum + value, 0);
    return { start, shares: heights.map(value => value / total) };
  });
}

// the size that the image is resized to, and the window of it that is kept: [width, height] each
function plan(width, height, settings) {
  let [wide, high] = [width, height];
  const { size, crop_size: crop } = settings;
  if (settings.do_resize && size.shortest_edge) {
    const long = Math.trunc(size.shortest_edge * Math.max(width, height) / Math.min(width, height));
    [wide, high] = width < height ? [size.shortest_edge, long] : [long, size.shortest_edge];
  } else if (settings.do_resize) [wide, high] = [size.width, size.height];
  const kept = settings.do_center_crop ? [crop.width, crop.height] : [wide, high];
  return { resized: [wide, high], kept };
}

// Decoded pixels { width, height, data: RGBA } to Float32Array (3, height, width) of the encoder.
export function encoderPixels(image, settings) {
  const { resized, kept } = plan(image.width, image.height, settings);
  const [across, down] = [image.width, image.height].map((size, axis) => {
    const spare = resized[axis] - kept[axis];
    const first = Math.max(0, Math.trunc(spare / 2));
    const count = Math.min(resized[axis], kept[axis]);
    return {
      border: spare < 0 ? Math.floor(-spare / 2) : 0,
      parts: weights(size, resized[axis], first, count, settings.resample),
    };
  });

  // along the rows that are needed, then along the columns, in 8 bits as Pillow has it
  const top = Math.min(...down.parts.map(part => part.start));
  const bottom = Math.max(...down.parts.map(part => part.start + part.shares.length));
  const width = across.parts.length;
  const narrow = new Uint8ClampedArray((bottom - top) * width * 3);
  for (let y = top; y < bottom; y++) {
    for (let x = 0; x < width; x++) {
      const { start, shares } = across.parts[x];
      for (let c = 0; c < 3; c++) {
        let value = 0;
        const from = (y * image.width + start) * 4 + c;
        for (let j = 0; j < shares.length; j++) value += shares[j] * image.data[from + 4 * j];
        narrow[((y - top) * width + x) * 3 + c] = Math.floor(value + 0.5);
      }
    }
  }

  const [wide, high] = kept;
  const { image_mean: mean, image_std: std, rescale_factor: factor = 1 / 255 } = settings;
  const pixels = new Float32Array(3 * high * wide);
  for (let c = 0; c < 3; c++) {
    const scaled = value => {
      const rescaled = settings.do_rescale === false ? value : value * factor;
      return settings.do_normalize === false ? rescaled : (rescaled - mean[c]) / std[c];
    };
    pixels.fill(scaled(0), c * high * wide, (c + 1) * high * wide);
    down.parts.forEach(({ start, shares }, y) => {
      for (let x = 0; x < width; x++) {
        let value = 0;
        for (let j = 0; j < shares.length; j++) {
          value += shares[j] * narrow[((start - top + j) * width + x) * 3 + c];
        }
        const place = (c * high + y + down.border) * wide + x + across.border;
        pixels[place] = scaled(Math.min(255, Math.max(0, Math.floor(value + 0.5))));
      }
    });
  }
  return pixels;
}
