// Starts the server that the tests talk to, ends it, and makes clients for it.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI from "openai";

const READY_WITHIN = 240_000;
const STOPPED_WITHIN = 40_000;

export const KEYS = { normal: "key-without-limits", elsewhere: "key-for-another-model" };

/// A server of our own, or the one that ELECTRON_BASE_URL and ELECTRON_API_KEY name. That one's other keys are not known.
export async function start() {
  const { ELECTRON_BASE_URL: given, ELECTRON_API_KEY: key, ELECTRON_GATEWAY_BIN: program } = process.env;
  if (given) return { url: given.replace(/\/v1\/?$/, ""), keys: { normal: key }, stop: async () => {} };
  if (!program) throw new Error("set ELECTRON_GATEWAY_BIN to the path of the server's program");

  const folder = mkdtempSync(join(tmpdir(), "electron-gateway-"));
  const url = `http://127.0.0.1:${await freePort()}`;
  const config = join(folder, "config.toml");
  const log = join(folder, "log");
  writeFileSync(config, configuration(new URL(url).host));
  const out = openSync(log, "w");
  const child = spawn(program, ["serve", "--config", config], { stdio: ["ignore", out, out] });
  closeSync(out);
  const ended = once(child, "exit");
  const told = () => readFileSync(log, "utf8").slice(-4000);

  const stop = async () => {
    if (child.exitCode === null) process.kill(child.pid, "SIGTERM");
    const late = setTimeout(() => process.kill(child.pid, "SIGKILL"), STOPPED_WITHIN);
    const [code] = await ended;
    clearTimeout(late);
    const end = told();
    rmSync(folder, { recursive: true });
    if (code !== 0) throw new Error(`the server ended with ${code}\n${end}`);
  };

  const until = Date.now() + READY_WITHIN;
  while (!(await ready(url))) {
    if (child.exitCode !== null) throw new Error(`the server ended with ${child.exitCode}\n${told()}`);
    if (Date.now() > until) {
      await stop();
      throw new Error("the server did not become ready");
    }
    // Not to keep a core busy that loads the model.
    await Promise.race([ended, new Promise((again) => setTimeout(again, 200))]);
  }
  return { url, keys: KEYS, stop };
}

/// The official SDK, which does not hide errors behind retries here.
export function clientOf(server, options = {}) {
  return new OpenAI({
    baseURL: `${server.url}/v1`,
    apiKey: server.keys.normal,
    maxRetries: 0,
    timeout: 120_000,
    ...options,
  });
}

function configuration(address) {
  const limits = { elsewhere: 'models = ["other"]' };
  const keys = Object.entries(KEYS).map(([name, key]) => {
    const hash = createHash("sha256").update(key).digest("hex");
    return `[[keys]]\nname = "${name}"\nhash = "sha256:${hash}"\n${limits[name] ?? ""}\n`;
  });
  return `[server]\nlisten = "${address}"\n\n${keys.join("\n")}`;
}

async function freePort() {
  const socket = createServer().listen(0, "127.0.0.1");
  await once(socket, "listening");
  const { port } = socket.address();
  socket.close();
  await once(socket, "close");
  return port;
}

async function ready(url) {
  try {
    return (await fetch(`${url}/health/ready`)).ok;
  } catch {
    return false;
  }
}
