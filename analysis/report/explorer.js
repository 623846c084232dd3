// The alpha explorer. Numbers are those of bhlog sweep: sums of integers, divided once.
window.bhlog = window.bhlog || {};
(function (bhlog) {
  "use strict";
  const state = { profile: 0, layer: "all", alpha: 0.05, min: 1, max: 1, target: null };
  let profiles = [];
  let ready = false;
  let quiet = false; // while the script itself moves a widget
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const element = (id) => document.getElementById(id);

  // Four significant digits as Python's %.4g: a tie goes to the even digit
  bhlog.number = function (x) {
    if (x === null || !Number.isFinite(x)) return "-";
    if (x === 0) return "0";
    if (Math.abs(x) >= 1000 && Math.abs(x) < 1e15) {
      return x.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
    }
    const places = 3 - Number(x.toExponential().split("e")[1]);
    const down = Math.floor(x * Math.pow(10, places));
    // half of a digit exactly, which only multiples of 5^places are in binary
    if (x * Math.pow(10, places) - down === 0.5 && (2 * down + 1) % Math.pow(5, places) === 0) {
      x = (down + (down % 2)) / Math.pow(10, places);
    }
    const power = Number(x.toExponential(3).split("e")[1]);
    if (power < -4 || power > 3) {
      const [digits, e] = x.toExponential(3).split("e");
      const exponent = String(Math.abs(Number(e))).padStart(2, "0");
      return (digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits) +
        "e" + (Number(e) < 0 ? "-" : "+") + exponent;
    }
    const text = x.toFixed(3 - power);
    return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  };
  const number = bhlog.number;
  const whole = (n) => n.toLocaleString("en-US");

  async function inflated(text, size) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const n = bytes.length / 8;
    if (n !== size) throw new Error(`a profile of ${n} numbers, expected ${size}`);
    const values = new Float64Array(n);
    for (let plane = 7; plane >= 0; plane--) {
      for (let i = 0; i < n; i++) values[i] = values[i] * 256 + bytes[plane * n + i];
    }
    return values;
  }

  function summed(values, length) {
    for (let i = 0; i < values.length; i++) if (i % length) values[i] += values[i - 1];
    return values;
  }

  class Profile {
    // counts, sums: (layer, bound, alpha), the first bound left out: it is 0
    static async of(data) {
      const self = Object.assign(new Profile(), data);
      const L = data.layers.length, B = data.bounds.length - 1, J = data.alphas.length;
      self.L = L; self.B = B; self.J = J;
      self.counts = summed(await inflated(data.counts, L * B * J), J);
      if (data.sums) self.sums = summed(await inflated(data.sums, L * B * J), J);
      else {
        self.sums = self.counts.slice();
        for (let l = 0; l < L; l++) {
          for (let i = (l * B + 1) * J; i < (l + 1) * B * J; i++) self.sums[i] += self.sums[i - J];
        }
      }
      self.total = new Float64Array(B * J);
      for (let i = 0; i < self.sums.length; i++) self.total[i % (B * J)] += self.sums[i];
      self.all = data.rows.reduce((a, b) => a + b, 0);
      if (data.noise) self.shuffled = summed(await inflated(data.noise.sums, L * B * J), J);
      const P = data.stops.length;
      if (data.kept) {
        self.reached = summed(await inflated(data.kept.reached, L * B * P), P);
        self.always = await inflated(data.kept.always, L * B);
      }
      return self;
    }
    rowsOf(l) { return l === "all" ? this.all : this.rows[l]; }
    sum(l, bound, j) {
      if (!bound) return 0;
      if (l === "all") return this.total[(bound - 1) * this.J + j];
      return this.sums[(l * this.B + bound - 1) * this.J + j];
    }
    mean(l, low, high, j) {
      const more = this.sum(l, high, j) - this.sum(l, low, j);
      return this.bounds[low] + more / Math.max(1, this.rowsOf(l));
    }
    // the same rule on shuffled logits; layers weigh as their rows do
    noisy(l, low, high, j) {
      if (!this.shuffled) return null;
      if (l === "all") {
        let sum = 0;
        for (let i = 0; i < this.L; i++) sum += this.noisy(i, low, high, j) * this.rows[i];
        return sum / Math.max(1, this.all);
      }
      const at = (bound) => bound ? this.shuffled[(l * this.B + bound - 1) * this.J + j] : 0;
      return this.bounds[low] + (at(high) - at(low)) / Math.max(1, this.noise.rows[l]);
    }
    // share of rows with n_rejected of at least a bound
    reach(l, bound, j) {
      if (!bound) return 1;
      let n = 0;
      if (l === "all") {
        for (let i = 0; i < this.L; i++) n += this.counts[(i * this.B + bound - 1) * this.J + j];
      } else n = this.counts[(l * this.B + bound - 1) * this.J + j];
      return n / Math.max(1, this.rowsOf(l));
    }
    // the last stop up to an alpha; -1 without any
    stop(j) {
      let at = -1;
      for (let i = 0; i < this.stops.length && this.stops[i] <= j; i++) at = i;
      return this.reached ? at : -1;
    }
    keeps(l, low, high, stop) {
      if (stop < 0) return null;
      if (l === "all") {
        let sum = 0;
        for (let i = 0; i < this.L; i++) sum += this.keeps(i, low, high, stop) * this.rows[i];
        return sum / this.all;
      }
      const P = this.stops.length;
      const at = (bound) => bound ? this.reached[(l * this.B + bound - 1) * P + stop] : 0;
      const first = low ? this.always[l * this.B + low - 1] : 0;
      return (first + at(high) - at(low)) / (this.one * Math.max(1, this.rows[l]));
    }
    // the last alpha of the grid up to this one
    place(alpha) {
      let j = 0;
      while (j + 1 < this.J && this.alphas[j + 1] <= alpha) j++;
      return j;
    }
    nearest(alpha) {
      const j = this.place(alpha);
      const next = Math.min(j + 1, this.J - 1);
      const far = (i) => Math.abs(Math.log(this.alphas[i] / alpha));
      return far(next) < far(j) ? next : j;
    }
    reaching(l, low, high, experts) {
      for (let j = 0; j < this.J; j++) if (this.mean(l, low, high, j) >= experts) return j;
      return -1;
    }
    boundAt(k, up) {
      let b = 0;
      while (b + 1 <= this.B && this.bounds[b + 1] <= k) b++;
      return up && this.bounds[b] < k ? b + 1 : b;
    }
    shares(l, low, high, j) {
      const shares = [];
      for (let b = low; b <= high; b++) {
        const from = b === low ? 1 : this.reach(l, b, j);
        shares.push(from - (b === high ? 0 : this.reach(l, b + 1, j)));
      }
      return shares;
    }
  }

  const current = () => profiles[state.profile];
  const boundText = (p, b) => whole(p.bounds[Math.max(0, Math.min(b, p.B))]);
  function setAlpha(j) {
    state.j = j;
    state.alpha = current().alphas[j];
  }

  bhlog.moved = function (name, value) {
    if (quiet || !ready) return;
    const p = current();
    if (name === "alpha") setAlpha(p.nearest(Math.min(Math.pow(10, value), p.alphas[p.J - 1])));
    else if (name === "exact_alpha") {
      if (value === null) return;
      if (!(value >= p.alphas[0] && value < 1)) {
        return say(`alpha must be at least ${number(p.alphas[0])} and below 1`);
      }
      setAlpha(p.place(value));
    } else if (name === "min_k") {
      state.min = value;
      state.max = Math.max(state.max, value, 1);
    } else if (name === "max_k") {
      state.max = Math.max(1, value);
      state.min = Math.min(state.min, state.max);
    } else if (name === "layer") state.layer = value === "all" ? "all" : p.layers.indexOf(+value);
    else if (name === "target") state.target = value;
    else if (name === "profile") choose(Number(value));
    if (name === "alpha" || name === "exact_alpha") state.target = null;
    show();
  };

  bhlog.tapped = function (indices) {
    if (quiet || !ready) return;
    state.layer = indices.length ? indices[0] : "all";
    show();
  };

  function choose(i) {
    const [low, high] = [current().bounds[state.min], current().bounds[state.max]];
    const whole = state.max === current().B;
    state.profile = i;
    const p = current();
    if (state.layer !== "all" && state.layer >= p.L) state.layer = "all";
    state.min = p.boundAt(low, false);
    state.max = whole ? p.B : Math.max(1, p.boundAt(high, false));
    setAlpha(p.nearest(state.alpha));
  }

  function say(text) { element("x-say").textContent = text; }

  function show() {
    const p = current(), l = state.layer;
    say("");
    if (state.target !== null) {
      const j = p.reaching(l, state.min, state.max, state.target);
      if (j >= 0) setAlpha(j);
      else {
        const most = number(p.mean(l, state.min, state.max, p.J - 1));
        say(`No alpha up to ${number(p.alphas[p.J - 1])} gives ${number(state.target)} experts a ` +
          `token: at most ${most} within these bounds.`);
      }
    }
    const { j, min, max } = state;
    readouts(p, l, j, min, max);
    plots(p, l, j, min, max);
    tables(p, l, j, min, max);
    widgets(p, l, j);
  }

  function readouts(p, l, j, min, max) {
    const mean = p.mean(l, min, max, j), shares = p.shares(l, min, max, j), stop = p.stop(j);
    const put = (id, text) => { element(id).textContent = text; };
    put("x-alpha", number(p.alphas[j]));
    put("x-mean", number(mean));
    put("x-of", l === "all" ? "experts a token, all layers" : `experts a token, layer ${p.layers[l]}`);
    put("x-kept", number(p.keeps(l, min, max, stop)));
    const there = stop >= 0 ? number(p.alphas[p.stops[stop]]) : "";
    put("x-kept-of", !p.reached ? "not counted: bhlog sweep --kept"
      : p.stops[stop] === j ? "of the router’s probability kept"
      : `of the router’s probability kept, at alpha ${there}`);
    put("x-flops", number(mean / p.top_k));
    put("x-flops-of", `× the experts’ FLOPs of native top-${p.top_k}`);
    put("x-at-min", number(100 * shares[0]) + " %");
    put("x-at-min-of", `of rows at min_k ${boundText(p, min)}`);
    put("x-at-max", number(100 * shares[shares.length - 1]) + " %");
    put("x-at-max-of", `of rows at max_k ${boundText(p, max)}`);
    const given = `--alpha ${p.alphas[j]} --min-k ${p.bounds[min]} --max-k ${p.bounds[max]}`;
    put("x-command", `${p.command} ${given}`);
    put("x-noise", number(p.noisy(l, min, max, j)));
    put("x-uniform", number(uniform(p.n_experts, p.alphas[j], p.bounds[min], p.bounds[max])));
  }

  // Mean n_selected where all E p-values of a row are uniform and independent: under BH
  // P(R = k) = C(E, k) (1 - alpha) x^k (1 - x)^(E - k - 1), x = k alpha / E (Finner, Roters 2002)
  function uniform(E, alpha, low, high) {
    let mean = 0, choose = 0; // log C(E, k)
    for (let k = 0; k <= E; k++) {
      if (k) choose += Math.log((E - k + 1) / k);
      const x = k * alpha / E;
      const log = choose + Math.log1p(-alpha) + (k ? k * Math.log(x) : 0) +
        (E - k - 1) * Math.log1p(-x);
      mean += Math.exp(log) * Math.min(high, Math.max(low, k));
    }
    return mean;
  }

  function plots(p, l, j, min, max) {
    let most = p.top_k;
    profiles.forEach((other, i) => {
      const low = other.boundAt(p.bounds[min], false), high = other.boundAt(p.bounds[max], false);
      const place = l === "all" ? "all" : other.layers.indexOf(p.layers[l]);
      const experts = place === -1 ? [] : Array.from(other.alphas, (_, at) =>
        other.mean(place, low, Math.max(1, high), at));
      most = Math.max(most, ...experts);
      model(`curve_${i}`).data = { alpha: place === -1 ? [] : Array.from(other.alphas), experts };
    });
    model("noise").data = !p.shuffled ? { alpha: [], experts: [] } : { alpha: Array.from(p.alphas),
      experts: Array.from(p.alphas, (_, at) => p.noisy(l, min, max, at)) };
    model("here").data = { alpha: [p.alphas[j]], experts: [p.mean(l, min, max, j)] };
    model("at_alpha").location = p.alphas[j];
    const mean = p.mean(l, min, max, j); // what people ask about, not the last alphas' height
    model("curve").y_range.end = Math.min(most, Math.max(2.5 * p.top_k, 1.5 * mean)) * 1.06;

    const experts = p.layers.map((_, i) => p.mean(i, min, max, j));
    model("means").data = { place: p.layers.map((_, i) => i), layer: p.layers, experts };
    model("overall").location = p.mean("all", min, max, j);
    model("by_layer").y_range.end = Math.max(p.top_k, ...experts) * 1.12;

    const shares = p.shares(l, min, max, j).map((share) => 100 * share);
    const left = shares.map((_, i) => p.bounds[min + i] - 0.42);
    const right = shares.map((_, i) =>
      (min + i >= max ? p.bounds[max] : p.bounds[min + i + 1] - 1) + 0.42);
    const k = shares.map((_, i) => rankText(p, min, max, i));
    model("shares").data = { left, right, share: shares, k };
    model("mean").location = p.mean(l, min, max, j);
    const last = shares.reduce((far, share, i) => (share > 0.02 ? i : far), 0);
    model("histogram").x_range.end = Math.min(p.n_experts, Math.max(right[last], 1.5 * p.top_k)) + 0.6;
    model("histogram").x_range.start = Math.min(p.bounds[min], 1) - 0.6;
    model("histogram").y_range.end = Math.max(...shares) * 1.1 || 1;
  }

  function rankText(p, min, max, i) {
    const from = p.bounds[min + i], to = min + i >= max ? from : p.bounds[min + i + 1] - 1;
    return from === to ? whole(from) : `${whole(from)}–${whole(to)}`;
  }

  function tables(p, l, j, min, max) {
    const stop = p.stop(j), asked = state.target;
    const rows = [...p.layers.map((_, i) => i), "all"].map((i) => {
      const shares = p.shares(i, min, max, j);
      const at = asked === null ? -1 : p.reaching(i, min, max, asked);
      return [i === "all" ? "all" : p.layers[i], number(p.mean(i, min, max, j)),
        number(p.keeps(i, min, max, stop)), number(100 * shares[0]),
        number(100 * shares[shares.length - 1]), at < 0 ? "-" : number(p.alphas[at])];
    });
    fill("x-layers", rows);
    const shares = p.shares(l, min, max, j);
    fill("x-histogram", shares.map((s, i) => [rankText(p, min, max, i), number(100 * s)])
      .filter((row, i) => shares[i] > 0));
  }

  function fill(id, rows) {
    const body = element(id);
    body.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    }));
  }

  function widgets(p, l, j) {
    quiet = true;
    const log = Math.log10(p.alphas[j]);
    if (p.nearest(Math.pow(10, model("alpha").value)) !== j) model("alpha").value = log;
    named("alpha", number(p.alphas[j]));
    for (const name of ["min_k", "max_k"]) {
      const bound = state[name.slice(0, 3)];
      if (model(name).end !== p.B) model(name).end = p.B;
      if (model(name).value !== bound) model(name).value = bound;
      named(name, boundText(p, bound));
    }
    model("layer").value = l === "all" ? "all" : String(p.layers[l]);
    model("exact_alpha").value = p.alphas[j];
    if (state.target === null) model("target").value = null;
    const options = [["all", "all layers"], ...p.layers.map((i) => [String(i), `layer ${i}`])];
    if (model("layer").options.length !== options.length) model("layer").options = options;
    model("means").selected.indices = l === "all" ? [] : [l];
    quiet = false;
  }

  // What a slider is at, above it and for readers who hear it
  function named(name, text) {
    element(`x-${name.replace("_", "-")}-now`).textContent = text;
    const view = Bokeh.index.find_one ? Bokeh.index.find_one(model(name)) : null;
    const handle = view && view.shadow_el.querySelector(".noUi-handle");
    if (!handle) return;
    handle.setAttribute("aria-label", name);
    handle.setAttribute("aria-valuetext", text);
  }

  bhlog.explore = async function () {
    const data = element("bhlog-profiles");
    if (!data) return;
    profiles = await Promise.all(JSON.parse(data.textContent).map((one) => Profile.of(one)));
    const p = current();
    setAlpha(p.nearest(p.alpha || 0.05));
    state.min = p.min_k === null ? p.boundAt(1) : p.boundAt(p.min_k, false);
    state.max = p.max_k === null ? p.B : Math.max(1, p.boundAt(p.max_k, false));
    ready = true;
    show();
    document.documentElement.dataset.explorer = "ready";
  };
  bhlog.state = state;
})(window.bhlog);
