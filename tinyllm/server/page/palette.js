// The looks of requests: eight hues that colour-blind eyes tell apart (Okabe and Ito's, with an indigo), in four textures.

const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a6fd0"];
const DARK_HUES = ["#3d9bd9", "#e69f00", "#1fb98c", "#d993ba", "#7cc8f2", "#ee7a2b", "#f0e442", "#9a90e8"];
const BLACK = "#10161c";
const TEXTURES = ["plain", "stripes", "dots", "grid"];
const NAMES = ["paper", "surface", "sunken", "ink", "soft", "line", "edge", "accent", "good", "warn", "bad", "copy", "one", "two"];

export class Palette {
  constructor() {
    this.tiles = new Map();
    this.probe = document.createElement("span");
    this.probe.hidden = true;
    document.body.append(this.probe);
    this.read();
  }

  // The theme's colours, as they are now.
  read() {
    this.tiles.clear();
    for (const name of NAMES) {
      this.probe.style.color = `var(--${name})`;
      this[name] = getComputedStyle(this.probe).color;
    }
    const [r, g, b] = this.surface.match(/\d+/g).map(Number);
    this.dark = r + g + b < 384;
  }

  hue(look) {
    return (this.dark ? DARK_HUES : HUES)[look % HUES.length];
  }

  // The hue, mixed into the surface.
  tint(look) {
    return mix(this.hue(look), this.surface, 0.3);
  }

  // Black or white, whichever is read more easily on the hue.
  on(look) {
    const light = luminance(this.hue(look));
    return (light + 0.05) / (luminance(BLACK) + 0.05) > 1.05 / (light + 0.05) ? BLACK : "#ffffff";
  }

  textured(look) {
    return Math.floor(look / HUES.length) % TEXTURES.length > 0;
  }

  // A fill style for the context: the hue with its texture.
  fill(context, look) {
    const texture = TEXTURES[Math.floor(look / HUES.length) % TEXTURES.length];
    if (texture === "plain") return this.hue(look);
    const key = look % (HUES.length * TEXTURES.length);
    if (!this.tiles.has(key)) this.tiles.set(key, context.createPattern(this._tile(texture, look), "repeat"));
    return this.tiles.get(key);
  }

  _tile(texture, look) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const context = tile.getContext("2d");
    context.fillStyle = this.hue(look);
    context.fillRect(0, 0, 6, 6);
    context.strokeStyle = context.fillStyle = mix(this.hue(look), this.on(look), 0.45);
    context.lineWidth = 1.5;
    context.beginPath();
    if (texture === "stripes") {
      for (const x of [-6, 0, 6]) {
        context.moveTo(x, 6);
        context.lineTo(x + 6, 0);
      }
    } else if (texture === "dots") {
      context.arc(3, 3, 1.4, 0, 7);
      context.fill();
    } else {
      context.moveTo(0, 3);
      context.lineTo(6, 3);
      context.moveTo(3, 0);
      context.lineTo(3, 6);
    }
    if (texture !== "dots") context.stroke();
    return tile;
  }

  // A small square with the look, for tables.
  swatch(canvas, look) {
    canvas.width = canvas.height = 26;
    canvas.style.width = canvas.style.height = "13px";
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    context.fillStyle = this.fill(context, look);
    context.fillRect(0, 0, 13, 13);
  }
}

function channels(colour) {
  if (colour[0] === "#") return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return colour.match(/\d+(\.\d+)?/g).slice(0, 3).map(Number);
}

function mix(a, b, share) {
  const [x, y] = [channels(a), channels(b)];
  return `rgb(${x.map((value, i) => Math.round(value * share + y[i] * (1 - share))).join(" ")})`;
}

function luminance(colour) {
  const [r, g, b] = channels(colour).map((value) => {
    const c = value / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
