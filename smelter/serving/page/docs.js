// Every route of openapi.json with the fields of its body.
"use strict";

const element = (name, values = {}, ...children) => {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
};

function kind(field) {
  if (field.$ref) return field.$ref.split("/").pop();
  if (field.anyOf) return [...new Set(field.anyOf.map(kind))].join(" or ");
  if (field.const !== undefined) return JSON.stringify(field.const);
  if (field.enum) return field.enum.map((value) => JSON.stringify(value)).join(", ");
  return field.type === "array" ? `list of ${kind(field.items || {})}` : field.type || "anything";
}

async function show() {
  const spec = await (await fetch("openapi.json")).json();
  const schemas = spec.components.schemas;
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const section = element("section", {},
        element("h2", {}, element("span", { textContent: `${method.toUpperCase()} ` }), path),
        element("p", { className: "quiet", textContent: route.description || "" }));
      const body = route.requestBody && route.requestBody.content["application/json"].schema;
      if (body && body.$ref) {
        const { properties, required = [] } = schemas[body.$ref.split("/").pop()];
        const rows = Object.entries(properties).map(([name, field]) => {
          const starts = field.default === undefined || field.default === null ? "" : `, ${JSON.stringify(field.default)} if left out`;
          const about = `${kind(field)}${required.includes(name) ? ", needed" : starts}`;
          return element("tr", {}, element("th", { scope: "row", textContent: name }),
            element("td", {}, about, ...(field.description ? [element("br"), field.description] : [])));
        });
        section.append(element("table", {}, element("tbody", {}, ...rows)));
      }
      document.getElementById("routes").append(section);
    }
  }
}

show();
