// What runs in browsers: the module that we serve, in pages and in a shared worker, and the page of the demo.
import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    languageOptions: {ecmaVersion: 2022, sourceType: "module", globals: {...globals.browser, ...globals.worker}},
    linterOptions: {reportUnusedDisableDirectives: "error"},
  },
];
