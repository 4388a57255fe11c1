// Fails unless two files have the same tokens, so that they differ only in comments and white space.
import {readFileSync} from "node:fs";
import {tokenize} from "espree";

const [tokens, others] = process.argv.slice(2).map((path) =>
  tokenize(readFileSync(path, "utf8"), {ecmaVersion: 2022, sourceType: "module", loc: true}));
const differs = (token, index) => token.type !== others[index]?.type || token.value !== others[index]?.value;
const found = tokens.find(differs) ?? others[tokens.length];
if (found) {
  console.error(`not the same from line ${found.loc.start.line} on: ${found.value}`);
  process.exit(1);
}
