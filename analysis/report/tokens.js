// Tokens of the text panel: shading, the step-up of a token, the pages of experts.
(function (bhlog) {
  "use strict";
  bhlog.text = function () {
    const source = document.getElementById("bhlog-text");
    if (!source) return;
    const data = JSON.parse(source.textContent);
    const get = (id) => document.getElementById(id);
    const make = (name, text, className) => {
      const one = document.createElement(name);
      if (text !== undefined) one.textContent = text;
      if (className) one.className = className;
      return one;
    };
    const option = (value, text) => new Option(text, value);
    const number = bhlog.number;
    const box = get("t-tokens");
    let active = -1;

    get("t-layer").append(option("all", "all"),
      ...data.layers.map((one, i) => option(i, one.layer)));
    const spans = data.texts.map((text, i) => {
      const span = make("span", text);
      span.id = `t-${i}`;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      return span;
    });
    box.append(...spans);

    const mean = (values) => {
      const known = values.filter((value) => value !== null);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    };
    const chosen = () => get("t-layer").value;
    const experts = (i) => chosen() === "all" ? mean(data.layers.map((one) => one.n[i]))
      : data.layers[chosen()].n[i];

    function shade() {
      const loss = get("t-by").value === "loss";
      const values = data.texts.map((_, i) => loss ? data.nll[i] : experts(i));
      const known = values.filter((value) => value !== null);
      const low = Math.min(...known), high = Math.max(...known);
      const colour = loss ? "213, 94, 0" : "0, 140, 210";
      spans.forEach((span, i) => {
        const part = values[i] === null || high === low ? 0 : (values[i] - low) / (high - low);
        span.style.background = `rgba(${colour}, ${(0.04 + 0.62 * part).toFixed(3)})`;
      });
    }

    function show(i) {
      if (i < 0 || i >= spans.length) return;
      if (active >= 0) {
        spans[active].classList.remove("on");
        spans[active].setAttribute("aria-selected", "false");
      }
      active = i;
      spans[i].classList.add("on");
      spans[i].setAttribute("aria-selected", "true");
      box.setAttribute("aria-activedescendant", spans[i].id);
      const layer = data.layers[chosen() === "all" ? 0 : chosen()];
      const loss = data.nll[i] === null ? "no loss" : `loss ${number(data.nll[i])} nats`;
      const text = JSON.stringify(data.texts[i]);
      get("t-about").textContent = `${text}, token ${i}: ${number(experts(i))} experts` +
        `${chosen() === "all" ? " on average" : ""}, ${loss}. Layer ${layer.layer}:`;
      const p = layer.p[i], n = layer.n[i];
      const rows = p.map((value, k) => {
        const row = make("tr");
        const level = (k + 1) * data.alpha / data.n_experts;
        row.append(make("td", k + 1), make("td", layer.experts[i][k]), make("td", number(value)),
          make("td", `${number(level)} ${value !== null && value <= level ? "✓" : ""}`),
          make("td", k < n ? "yes" : "no"));
        return row;
      });
      const table = get("t-steps");
      table.hidden = false;
      table.tBodies[0].replaceChildren(...rows);
      table.caption.textContent = n > p.length ? `Step-up: the first ${p.length} of ${n}`
        : `Step-up: ${n} selected`;
    }

    const over = (event) => {
      const i = spans.indexOf(event.target);
      if (i >= 0) show(i);
    };
    box.addEventListener("mouseover", over);
    box.addEventListener("click", over);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(Math.max(0, Math.min(spans.length - 1, active + step)));
      spans[active].scrollIntoView({ block: "nearest" });
    });
    get("t-by").addEventListener("change", shade);
    get("t-layer").addEventListener("change", () => { shade(); show(active); });

    const layers = get("t-page-layer"), list = get("t-page-expert");
    layers.append(...data.pages.map((page, i) => option(i, page.layer)));
    function fill() {
      const page = data.pages[layers.value];
      list.replaceChildren(...Object.keys(page.experts).map((e) => option(e, e)));
      read();
    }
    function read() {
      const page = data.pages[layers.value], expert = page.experts[list.value];
      const parts = [make("p", `Selected for ${expert.rows.toLocaleString("en-US")} tokens of those read.`, "note")];
      const tokens = make("ol", undefined, "contexts");
      for (const [before, token, after] of expert.top) {
        const item = make("li"), mark = make("mark", token);
        item.append(before, mark, after);
        tokens.append(item);
      }
      parts.push(tokens);
      const table = make("table"), head = make("thead"), row = make("tr"), body = make("tbody");
      ["source", "% of its tokens", "% of all tokens"].forEach((name, i) => {
        const cell = make("th", name, i ? "" : "text");
        cell.scope = "col";
        row.append(cell);
      });
      head.append(row);
      page.names.forEach((name, i) => {
        const one = make("tr");
        one.append(make("td", name, "text"), make("td", number(100 * expert.sources[i])),
          make("td", number(100 * page.share[i])));
        body.append(one);
      });
      table.append(head, body);
      parts.push(table);
      get("t-page").replaceChildren(...parts);
    }
    layers.addEventListener("change", fill);
    list.addEventListener("change", read);
    shade();
    if (data.pages.length) fill();
  };
})(window.bhlog);
