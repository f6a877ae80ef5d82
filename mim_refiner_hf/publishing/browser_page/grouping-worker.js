// A worker that groups features: { features: { n, d, v }, asked, dimensions } in, { tell } on the
// way, and at the end what `findGroups` and `components` find.

import { components, findGroups } from "./groups.js";

self.addEventListener("message", ({ data: { features, asked, dimensions } }) => {
  try {
    const tell = (what, share) => self.postMessage({ tell: { what, share } });
    const groups = findGroups(features, asked, { tell });
    self.postMessage({ groups, shown: components(features, dimensions) });
  } catch (error) {
    self.postMessage({ failure: String(error) });
  }
});
