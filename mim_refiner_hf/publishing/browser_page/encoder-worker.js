// A worker that turns image files into features and thumbnails. The page sends { load } once, then
// batches of { index, file }; it answers { ready }, and per image { index, feature, thumbnail } or
// { index, error }.

import { AutoModel, Tensor, env } from "./library/transformers.min.js";
import { encoderPixels } from "./pixels.js";

const here = path => new URL(path, import.meta.url).href;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useBrowserCache = false;
env.useWasmCache = false;
env.localModelPath = here("models/");
env.backends.onnx.wasm.numThreads = 1;
env.backends.onnx.wasm.wasmPaths = {
  mjs: here("library/ort-wasm-simd-threaded.mjs"),
  wasm: here("library/ort-wasm-simd-threaded.wasm"),
};

// longest side of a thumbnail, and its quality as JPEG
const THUMBNAIL = 112;
const QUALITY = 0.75;

let model, settings;
async function load() {
  const answer = await fetch(here("models/encoder/preprocessor_config.json"));
  settings = await answer.json();
  model = await AutoModel.from_pretrained("encoder", { dtype: "q8", device: "wasm" });
  self.postMessage({ ready: true });
}

// upright pixels on white, in the file's own colours, as Python decodes them
function draw(bitmap, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  return { canvas, pen };
}

async function thumbnailOf(bitmap) {
  const shrink = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
  const shrunk = side => Math.max(1, Math.round(side * shrink));
  const { canvas } = draw(bitmap, shrunk(bitmap.width), shrunk(bitmap.height));
  const jpeg = await canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY });
  const bytes = new Uint8Array(await jpeg.arrayBuffer());
  return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
}

async function read(file) {
  const plain = { colorSpaceConversion: "none", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(file, plain);
  const { pen } = draw(bitmap, bitmap.width, bitmap.height);
  const image = pen.getImageData(0, 0, bitmap.width, bitmap.height);
  const thumbnail = await thumbnailOf(bitmap);
  bitmap.close();
  return { pixels: encoderPixels(image, settings), thumbnail };
}

async function encode(batch) {
  const images = [];
  for (const { index, file } of batch) {
    try {
      images.push({ index, ...await read(file) });
    } catch (error) {
      self.postMessage({ index, error: `this browser cannot read it: ${error.message}` });
    }
  }
  if (images.length) {
    const { height, width } = settings.do_center_crop ? settings.crop_size : settings.size;
    const pixels = new Float32Array(images.length * 3 * height * width);
    images.forEach((image, i) => pixels.set(image.pixels, i * 3 * height * width));
    const pixel_values = new Tensor("float32", pixels, [images.length, 3, height, width]);
    const { pooler_output: { data, dims } } = await model({ pixel_values });
    images.forEach(({ index, thumbnail }, i) => {
      self.postMessage({ index, thumbnail, feature: data.slice(i * dims[1], (i + 1) * dims[1]) });
    });
  }
  self.postMessage({ ready: true });
}

// one after the other, whatever comes in between
let turn = Promise.resolve();
self.addEventListener("message", ({ data }) => {
  turn = turn.then(() => data.load ? load() : encode(data.batch));
  turn.catch(error => self.postMessage({ failure: String(error) }));
});
