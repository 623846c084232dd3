// What the page does beside its plots: light and dark, sorting, copying, printing.
(function (bhlog) {
  "use strict";
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function colours() {
    const style = getComputedStyle(root);
    const get = (name) => style.getPropertyValue(name).trim();
    const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(get);
    for (const doc of Bokeh.documents) {
      for (const model of doc._all_models.values()) {
        if (model.type === "Figure" || model.type === "Plot") {
          model.border_fill_color = card;
          model.background_fill_color = card;
        } else if (/Axis$/.test(model.type)) {
          model.axis_label_text_color = soft;
          model.major_label_text_color = soft;
        } else if (model.type === "Grid") {
          if (model.grid_line_color !== null) model.grid_line_color = line;
        } else if (model.type === "Legend") model.label_text_color = ink;
        else if (model.type === "ColorBar") {
          model.title_text_color = soft;
          model.major_label_text_color = soft;
        }
      }
    }
  }

  function theme(choice) {
    if (choice) root.dataset.theme = choice;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    const button = document.getElementById("theme");
    if (button) button.textContent = isDark ? "Light" : "Dark";
    colours();
    return isDark;
  }

  function sort(button) {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = Array.from(body.rows);
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return (both ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    });
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  }

  async function copy(button) {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") theme(theme() ? "light" : "dark");
    else if (button.classList.contains("sort")) sort(button);
    else if (button.classList.contains("copy")) copy(button);
  });
  dark.addEventListener("change", () => theme());

  let opened = null; // while printing
  let before;
  addEventListener("beforeprint", () => {
    if (opened) return;
    before = root.dataset.theme;
    theme("light");
    opened = Array.from(document.querySelectorAll("details:not([open])"));
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened || []) one.open = false;
    opened = null;
    if (before) theme(before);
    else {
      delete root.dataset.theme;
      theme();
    }
  });

  bhlog.start = async function () {
    if (!Bokeh.documents.length && document.querySelector("[data-root-id]")) {
      setTimeout(bhlog.start, 20);
      return;
    }
    bhlog.text();
    await bhlog.explore();
    theme();
    root.dataset.page = "ready";
  };
  addEventListener("DOMContentLoaded", () => bhlog.start());
})(window.bhlog);
