#!/usr/bin/env bash
# From image-text pairs to a hierarchy and a page to look at it, in one command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/hierarchy.sh SOURCE OUT [OPTIONS] [KEY VALUE...]

    OUT/store            features of the pairs                    gram embed
    OUT/hierarchy        topics and visual domains                gram cluster
    OUT/hierarchy.html   the page                                 gram inspect --html

SOURCE is what `gram embed` reads: a captions file, a folder, shards. KEY VALUE are settings of `gram cluster`, such as
CHC.FILTER.KEEP 1.0. Each command is printed before it is run. The same command again does what is not finished, and
nothing twice: with other KEY VALUE it clusters anew, from the same store.

  --backbone NAME    CLIP: an OpenAI name, a file, or gram-small (default: ViT-B/16)
  --embed "OPTIONS"  more options of gram embed, in one word: --embed "--workers 4 --device cuda"
  --page "OPTIONS"   more options of gram inspect: --page "--topics 100 --images 6"
  --dry-run          print the commands alone
HELP
    environment_help
}

environment_options "$@"
set -- ${REST[@]+"${REST[@]}"}
BACKBONE=ViT-B/16
EMBED=() PAGE=() WORDS=() DRY=
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) DRY=1; shift ;;
        --backbone | --embed | --page)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            case "$1" in
                --backbone) BACKBONE="$2" ;;
                --embed) read -r -a EMBED <<<"$2" ;;
                --page) read -r -a PAGE <<<"$2" ;;
            esac
            shift 2 ;;
        -*) fail "unknown option $1; --help names those there are" ;;
        *) WORDS+=("$1"); shift ;;
    esac
done
[ "${#WORDS[@]}" -ge 2 ] || fail "expected SOURCE and OUT, found ${#WORDS[@]} argument(s); see --help"
SOURCE="${WORDS[0]}" OUT="${WORDS[1]}"
OPTS=(${WORDS[@]+"${WORDS[@]:2}"})
[ $((${#OPTS[@]} % 2)) -eq 0 ] || fail "expected KEY VALUE pairs at the end, found ${OPTS[*]: -1} without a value"

run() {
    printf '+ gram' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    [ -n "$DRY" ] || "$BIN/gram" "$@"
}

is_clustered() { # by these settings, from this store
    [ -f "$OUT/hierarchy/topics.json" ] && [ ! "$OUT/store/manifest.json" -nt "$OUT/hierarchy/topics.json" ] &&
        [ -f "$OUT/settings" ] && [ "$(cat "$OUT/settings")" = "${OPTS[*]-}" ]
}

[ -n "$DRY" ] || prepare_environment demo
run embed "$SOURCE" -o "$OUT/store" --backbone "$BACKBONE" ${EMBED[@]+"${EMBED[@]}"}
if [ -n "$DRY" ] || ! is_clustered; then
    [ -n "$DRY" ] || rm -f "$OUT/settings"
    run cluster "$OUT/store" -o "$OUT/hierarchy" ${OPTS[@]+"${OPTS[@]}"}
    [ -n "$DRY" ] || printf '%s\n' "${OPTS[*]-}" >"$OUT/settings"
else
    say "$OUT/hierarchy: finished before, nothing to do"
fi
run inspect "$OUT/hierarchy" --html "$OUT/hierarchy.html" ${PAGE[@]+"${PAGE[@]}"}
