{{/*
What the chart knows of a profile: its name, its GPU, how many of them a replica has, and what bounds its batch. An own
profile is read from `profiles`, a shipped one from files/profiles.json. Takes (list ROOT PROFILE WHERE); gives JSON.
*/}}
{{- define "penstock.profile" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}{{- $where := index . 2 -}}
{{- if hasSuffix ".json" $name -}}
  {{- if not (hasKey $root.Values.profiles $name) -}}
    {{- fail (printf "%s: profile %q is not in `profiles`; add the file there (--set-file), or name a shipped profile" $where $name) -}}
  {{- end -}}
  {{- $profile := fromJson (get $root.Values.profiles $name) -}}
  {{- if or (hasKey $profile "Error") (not (hasKey $profile "limits")) -}}
    {{- fail (printf "profiles[%q] is not a profile's JSON document; put there what `penstock measure --out FILE` wrote" $name) -}}
  {{- end -}}
  {{- dict "name" $profile.name "model" $profile.model "gpu" $profile.gpu "gpus_per_replica" $profile.gpus_per_replica "limits" $profile.limits "path" (printf "profiles/%s" $name) | toJson -}}
{{- else -}}
  {{- $shipped := $root.Files.Get "files/profiles.json" | fromJson -}}
  {{- if not (hasKey $shipped $name) -}}
    {{- fail (printf "%s: there is no shipped profile %q; there are %s. One of your own goes into `profiles` and is named with .json" $where $name (keys $shipped | sortAlpha | join ", ")) -}}
  {{- end -}}
  {{- merge (dict "name" $name "path" $name) (get $shipped $name) | toJson -}}
{{- end -}}
{{- end -}}

{{/* A model's name as a label's value: its like where it has other characters, told apart by a hash. */}}
{{- define "penstock.poolLabel" -}}
{{- if and (regexMatch "^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$" .) (le (len .) 63) -}}{{ . }}
{{- else -}}{{ printf "%s-%s" (regexReplaceAll "[^A-Za-z0-9-]" . "-" | trunc 54 | trimSuffix "-") (sha256sum . | trunc 8) }}{{- end -}}
{{- end -}}

{{/* The labels by which a pool finds an engine group of this release. Takes (list ROOT MODEL). */}}
{{- define "penstock.discoverSelector" -}}
{{- $root := index . 0 -}}
{{- printf "penstock.io/pool=%s,app.kubernetes.io/instance=%s" (include "penstock.poolLabel" (index . 1)) $root.Release.Name -}}
{{- end -}}

{{/* How a pool finds the engine groups of its model. Takes (list ROOT MODEL GROUPS); gives JSON. */}}
{{- define "penstock.discover" -}}
{{- $root := index . 0 -}}{{- $model := index . 1 -}}{{- $groups := index . 2 -}}
{{- $profiles := list -}}{{- $slowdowns := list -}}
{{- range $groups -}}
  {{- $profile := include "penstock.profile" (list $root .profile (printf "engines %q" .name)) | fromJson -}}
  {{- $profiles = append $profiles $profile.path | uniq -}}
  {{- $slowdowns = append $slowdowns (ternary (default 1 .slowdown) 1 (eq .device "virtual")) | uniq -}}
{{- end -}}
{{- if gt (len $slowdowns) 1 -}}
  {{- fail (printf "engines of model %q have different slowdowns (%s); all engines of a pool run equally fast: give them one" $model (join ", " $slowdowns)) -}}
{{- end -}}
{{- dict "selector" (include "penstock.discoverSelector" (list $root $model)) "namespace" $root.Release.Namespace "port" "http" "profiles" $profiles "priority_scheduling" true "slowdown" (first $slowdowns) | toJson -}}
{{- end -}}

{{/* penstock.yaml: what the values say, with the sockets, the folders and the fleet as they are in the cluster. */}}
{{- define "penstock.config" -}}
{{- $root := . -}}
{{- $config := deepCopy .Values.config -}}
{{- $models := list -}}
{{- $pools := list -}}
{{- range $config.pools -}}
  {{- $pool := . -}}
  {{- $models = append $models $pool.model -}}
  {{- $groups := list -}}
  {{- range $root.Values.engines -}}{{- if eq .model $pool.model -}}{{- $groups = append $groups . -}}{{- end -}}{{- end -}}
  {{- if and $groups (hasKey $pool "discover") -}}
    {{- fail (printf "config.pools: %q has a discover of its own and engine groups of the chart; put one of them into another pool or release" $pool.model) -}}
  {{- end -}}
  {{- if $groups -}}
    {{- $pool = set $pool "discover" (include "penstock.discover" (list $root $pool.model $groups) | fromJson) -}}
  {{- end -}}
  {{- $pools = append $pools $pool -}}
{{- end -}}
{{- range .Values.engines -}}
  {{- if not (has .model $models) -}}
    {{- fail (printf "engines %q: no pool in config.pools has the model %q; there are %s" .name .model (join ", " $models)) -}}
  {{- end -}}
{{- end -}}
{{- $_ := set $config "pools" $pools -}}
{{- $gateway := dict "host" "0.0.0.0" "port" 8080 "admin_port" 9090 "admin_token_file" "/etc/penstock-admin/token" "drain_s" .Values.gateway.drainSeconds "drain_delay_s" .Values.gateway.drainDelaySeconds -}}
{{- $_ := set $config "gateway" (merge $gateway (default dict $config.gateway)) -}}
{{- $_ := set $config "controller" (merge (dict "metrics_host" "0.0.0.0" "metrics_port" 9091) (default dict $config.controller)) -}}
{{- $_ := set $config "state_dir" "/var/lib/penstock/state" -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The namespaces in which the controller watches EndpointSlices, as JSON: {"namespaces": [...]}. */}}
{{- define "penstock.watchedNamespaces" -}}
{{- $found := list -}}
{{- range (include "penstock.config" . | fromYaml).pools -}}
  {{- with .discover -}}{{- $found = append $found (default $.Release.Namespace .namespace) -}}{{- end -}}
{{- end -}}
{{- dict "namespaces" ($found | uniq | sortAlpha) | toJson -}}
{{- end -}}
