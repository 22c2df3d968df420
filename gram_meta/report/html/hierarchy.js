(function () {
  "use strict";
  var WIDTH = 1000, HEIGHT = 700, NEAREST = 14, CLOSEST = 40; // of the map; pixels to the nearest point; largest zoom

  function all(selector, root) { return Array.prototype.slice.call((root || document).querySelectorAll(selector)); }
  function between(low, value, high) { return Math.max(low, Math.min(value, high)); }
  function fits(text, words) { return words.every(function (word) { return text.indexOf(word) >= 0; }); }

  // Show the entry of a topic, also one in the closed table or one that the search hides.
  function uncover(topic) {
    var entry = document.getElementById("topic-" + topic), details = entry && entry.closest("details");
    if (entry) entry.hidden = false;
    if (details) details.open = true;
    return entry;
  }

  // ------------------------------------------------------------------------------------------------------------- Map

  function mapOf(svg) {
    var tip = svg.parentNode.querySelector(".tip"), view = {x: 0, y: 0, k: 1}, chosen = null, waiting = false;
    var here = document.createElementNS(svg.namespaceURI, "path"), label = {}, points = [], topics = {};
    here.setAttribute("class", "here");
    all("g a", svg).forEach(function (link) { label[link.getAttribute("href").slice(7)] = link; });
    var groups = all("path", svg).map(function (path) {
      var captions = path.dataset.captions.split("\n"), topic = path.dataset.topic;
      var group = {path: path, topic: topic, word: path.dataset.word, label: label[topic], shown: 0};
      group.points = path.getAttribute("d").split("h0").slice(0, -1).map(function (d, i) {
        var place = d.slice(1).split(" ");
        return {group: group, x: +place[0], y: +place[1], d: d + "h0", caption: captions[i], shown: true};
      });
      points = points.concat(group.points);
      if (topic) topics[topic] = group;
      return group;
    });
    svg.firstElementChild.after(here);

    function pixels() { return svg.getBoundingClientRect().width * view.k / WIDTH || 1; } // of a unit of the map
    function place(event) {
      var box = svg.getBoundingClientRect(), unit = pixels();
      return {x: view.x + (event.clientX - box.left) / unit, y: view.y + (event.clientY - box.top) / unit};
    }

    function draw() {
      waiting = false;
      view.k = between(1, view.k, CLOSEST);
      view.x = between(0, view.x, WIDTH - WIDTH / view.k);
      view.y = between(0, view.y, HEIGHT - HEIGHT / view.k);
      svg.setAttribute("viewBox", [view.x, view.y, WIDTH / view.k, HEIGHT / view.k].join(" "));
      svg.classList.toggle("near", view.k > 1);
      var unit = pixels(), taken = [];
      svg.style.setProperty("--unit", 1 / unit);
      // Words of topics, the chosen one and large ones first, where they cover no other word.
      groups.filter(function (group) { return group.label; }).sort(function (a, b) {
        return (b === chosen) - (a === chosen) || b.points.length - a.points.length;
      }).forEach(function (group) {
        var text = group.label.firstElementChild, half = (3.6 * group.word.length + 4) / unit, high = 9 / unit;
        var x = +text.getAttribute("x"), y = +text.getAttribute("y");
        var seen = group.shown && x - half > view.x && x + half < view.x + WIDTH / view.k && y - high > view.y
          && y < view.y + HEIGHT / view.k && taken.every(function (box) {
            return Math.abs(x - box[0]) > half + box[2] || Math.abs(y - box[1]) > 2 * high;
          });
        if (seen) taken.push([x, y, half]);
        group.label.classList.toggle("off", !seen);
      });
    }
    function redraw() {
      if (!waiting) { waiting = true; requestAnimationFrame(draw); }
    }

    function zoom(factor, at) {
      var k = between(1, view.k * factor, CLOSEST);
      at = at || {x: view.x + WIDTH / view.k / 2, y: view.y + HEIGHT / view.k / 2};
      view = {x: at.x - (at.x - view.x) * view.k / k, y: at.y - (at.y - view.y) * view.k / k, k: k};
      redraw();
    }

    function nearest(event) {
      var at = place(event), best = null, least = NEAREST / pixels();
      points.forEach(function (point) {
        var away = point.shown ? Math.hypot(point.x - at.x, point.y - at.y) : Infinity;
        if (away < least) { least = away; best = point; }
      });
      return best;
    }

    function point(at) {
      here.setAttribute("d", at ? at.d : "");
      tip.hidden = !at;
      if (!at) return;
      tip.children[0].textContent = at.group.topic ? at.group.word : "no topic";
      tip.children[1].textContent = at.caption;
      tip.children[2].textContent = at.group.topic ? at.group.points.length + " points" : "";
      var unit = pixels(), x = (at.x - view.x) * unit, y = (at.y - view.y) * unit, width = svg.clientWidth;
      tip.style.left = between(0, x - tip.offsetWidth / 2, width - tip.offsetWidth) + "px";
      tip.style.top = (y > tip.offsetHeight + 14 ? y - tip.offsetHeight - 12 : y + 12) + "px";
    }

    function choose(group) {
      if (chosen) { chosen.path.classList.remove("on"); chosen.label.classList.remove("on"); }
      chosen = group || null;
      svg.classList.toggle("chosen", Boolean(chosen));
      if (chosen) {
        chosen.path.classList.add("on");
        chosen.label.classList.add("on");
        chosen.path.parentNode.appendChild(chosen.path); // above the others
      }
      redraw();
    }

    // A drag with the mouse or one finger moves the map, two fingers zoom; a vertical stroke over the whole map scrolls.
    var down = {}, moved = false;
    svg.addEventListener("pointerdown", function (event) {
      if (event.button) return;
      moved = false;
      down[event.pointerId] = event;
    });
    svg.addEventListener("pointermove", function (event) {
      if (!event.buttons) delete down[event.pointerId]; // it was released outside
      var before = down[event.pointerId], others = Object.keys(down).filter(function (id) { return id != event.pointerId; });
      if (!before) { if (event.pointerType === "mouse") point(nearest(event)); return; }
      var dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
      if (!moved && !others.length && Math.hypot(dx, dy) < 5) return;
      if (!moved) { moved = true; point(null); svg.setPointerCapture(event.pointerId); svg.classList.add("moving"); }
      down[event.pointerId] = event;
      if (others.length) {
        var other = down[others[0]], far = function (a) { return Math.hypot(a.clientX - other.clientX, a.clientY - other.clientY); };
        zoom(far(event) / Math.max(far(before), 1), place(other));
      }
      var share = others.length ? 2 : 1;
      view.x -= dx / pixels() / share;
      view.y -= dy / pixels() / share;
      redraw();
    });
    ["pointerup", "pointercancel"].forEach(function (name) {
      svg.addEventListener(name, function (event) { delete down[event.pointerId]; svg.classList.remove("moving"); });
    });
    svg.addEventListener("dragstart", function (event) { event.preventDefault(); }); // of a word's link
    svg.addEventListener("pointerleave", function (event) { if (event.pointerType === "mouse") point(null); });
    svg.addEventListener("wheel", function (event) {
      if (!event.ctrlKey && !event.metaKey) return; // scrolls the page
      event.preventDefault();
      point(null);
      zoom(Math.exp(-between(-100, event.deltaY, 100) / 150), place(event));
    }, {passive: false});
    svg.addEventListener("click", function (event) {
      var link = event.target.closest("a");
      if (moved) { event.preventDefault(); moved = false; return; }
      if (link) {
        choose(topics[link.getAttribute("href").slice(7)]);
        uncover(chosen.topic); // the browser follows the link
        return;
      }
      var at = nearest(event), again = at && at.group === chosen;
      point(at);
      choose(at && at.group.topic ? at.group : null);
      // A finger cannot hover: its first tap shows the caption, the second goes to the entry.
      var entry = chosen && (event.pointerType !== "touch" || again) && uncover(chosen.topic);
      if (entry) {
        location.hash = entry.id; // the browser's "back" returns to the map
        entry.scrollIntoView();
      }
    });
    svg.addEventListener("keydown", function (event) {
      var step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (step) {
        view.x += step[0] * WIDTH / view.k / 8;
        view.y += step[1] * HEIGHT / view.k / 8;
        redraw();
      } else if (event.key === "Escape") {
        point(null);
        choose(null);
      } else if (!press(event.key)) return;
      event.preventDefault();
    });
    function press(key) {
      if (key === "+" || key === "=") zoom(1.5);
      else if (key === "-") zoom(1 / 1.5);
      else if (key === "0") zoom(1 / CLOSEST);
      else return false;
      return true;
    }
    all(".zoom button").forEach(function (button) { button.addEventListener("click", function () { press(button.value); }); });
    all("a.place").forEach(function (link) {
      var group = topics[link.dataset.topic];
      link.hidden = !group; // no pair of the topic is among those drawn
      link.addEventListener("click", function () {
        var text = group.label.firstElementChild, k = Math.max(view.k, 3);
        view = {x: text.getAttribute("x") - WIDTH / k / 2, y: text.getAttribute("y") - HEIGHT / k / 2, k: k};
        choose(group);
      });
    });
    addEventListener("resize", redraw);

    // Show the points whose topic or caption has all words; return their number, and that of all.
    function filter(words, repeated) {
      var shown = 0;
      groups.forEach(function (group) {
        var found = group.path.dataset.find || "", left = !repeated || "repeated" in group.path.dataset;
        group.points.forEach(function (one) { one.shown = left && (!words.length || fits(found + " " + one.caption.toLowerCase(), words)); });
        var those = group.points.filter(function (one) { return one.shown; });
        group.path.setAttribute("d", those.map(function (one) { return one.d; }).join(""));
        group.shown = those.length;
        shown += those.length;
      });
      point(null);
      redraw();
      return [shown, points.length];
    }
    document.querySelector(".keys").hidden = false;
    return filter;
  }

  // ---------------------------------------------------------------------------------------------------------- Search

  var svg = document.querySelector(".map svg"), filterMap = svg && mapOf(svg);
  var forms = all("form.find"), searches = all("form.find input[type=search]"), items = all("article[data-find], tr[data-find]");
  var repeated = document.querySelector("form.find input[type=checkbox]");
  function show() {
    var words = searches[0].value.toLowerCase().split(/\s+/).filter(Boolean), count = 0, shown = 0;
    items.forEach(function (item) {
      var kept = fits(item.getAttribute("data-find"), words) && (!repeated.checked || item.hasAttribute("data-repeated"));
      item.hidden = !kept;
      if (item.classList.contains("topic")) { count += 1; shown += kept ? 1 : 0; }
    });
    var numbers = filterMap ? [filterMap(words, repeated.checked), [shown, count]] : [[shown, count]];
    forms.forEach(function (form, i) {
      var is = numbers[i], what = i === numbers.length - 1 ? " topics" : " points";
      form.querySelector("output").textContent = is[0] < is[1] ? is[0] + " of " + is[1] + what : "";
    });
  }
  forms.forEach(function (form) {
    form.hidden = false;
    form.addEventListener("input", function (event) {
      if (event.target.type === "search") searches.forEach(function (search) { search.value = event.target.value; });
      show();
    });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
  });
  if (forms.length) show();
})();
